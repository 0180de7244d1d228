"""What was measured on a machine, in one file: `sidp bench --profile FILE` writes it, planning and policy read it.

docs/profile.md describes the file.
"""

from __future__ import annotations

import bisect
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import ConfigError

VERSION = 1
_RATES = ("memory_bytes", "hbm_bytes_per_s", "flops_per_s")


@dataclass(frozen=True)
class FFNTimes:
    """Measured seconds of one FFN (as one GPU computes it) at numbers of rows, ascending.

    ``hidden`` and ``inner`` are the FFN's sizes, ``inner`` that of one GPU; ``dtype`` is the weights'.
    """

    hidden: int
    inner: int
    gated: bool
    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    dtype: torch.dtype = torch.bfloat16

    def at(self, rows: int) -> float:
        """Between two measurements on the line that joins them; beyond the last in proportion to the rows."""
        if rows <= self.rows[0]:
            return self.seconds[0]
        if rows >= self.rows[-1]:
            return self.seconds[-1] * rows / self.rows[-1]
        after = bisect.bisect_right(self.rows, rows)
        (r0, r1), (s0, s1) = self.rows[after - 1 : after + 1], self.seconds[after - 1 : after + 1]
        return s0 + (s1 - s0) * (rows - r0) / (r1 - r0)


def find_times(measured: Iterable[FFNTimes], hidden: int, inner: int, gated: bool, itemsize: int) -> FFNTimes | None:
    """Those of an FFN of this shape, None where there are none; dtypes of one size count as the same."""
    wanted = (hidden, inner, gated, itemsize)
    return next((t for t in measured if (t.hidden, t.inner, t.gated, t.dtype.itemsize) == wanted), None)


@dataclass(frozen=True)
class MachineProfile:
    """Measured, attainable rates of one device and its link; None where a rate was not measured.

    ``link_bytes_per_s`` is what one rank can fetch, one way; 0 where nothing limits it. ``round_trip_s`` is what a CaS
    request takes besides its computing.
    """

    name: str
    link_bytes_per_s: float
    memory_bytes: int | None = None
    hbm_bytes_per_s: float | None = None
    flops_per_s: float | None = None
    round_trip_s: float | None = None
    ffn_times: tuple[FFNTimes, ...] = field(default=(), repr=False)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file. Raises ConfigError where that fails."""
        record: dict[str, Any] = {"sidp_profile": VERSION, "name": self.name, "link_bytes_per_s": self.link_bytes_per_s}
        for key in (*_RATES, "round_trip_s"):
            if getattr(self, key) is not None:
                record[key] = getattr(self, key)
        record["ffn_times"] = [
            {
                "hidden_size": times.hidden,
                "intermediate_size": times.inner,
                "gated": times.gated,
                "dtype": str(times.dtype).removeprefix("torch."),
                "rows": list(times.rows),
                "seconds": list(times.seconds),
            }
            for times in self.ffn_times
        ]
        try:
            Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"profile {path} cannot be written: {error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike) -> MachineProfile:
        """Raises ConfigError naming the file and what is wrong with it."""
        path = Path(path)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise ConfigError(f"profile {path} cannot be read as JSON: {error}") from error
        if not isinstance(record, dict):
            raise ConfigError(f"profile {path} holds a {type(record).__name__}, expected a JSON object")
        if record.get("sidp_profile", VERSION) != VERSION:
            raise ConfigError(
                f"profile {path}: sidp_profile is {record['sidp_profile']!r}, this version reads {VERSION}: write it anew "
                f"with sidp bench --profile"
            )
        rates = {key: _number(record, key, path) for key in (*_RATES, "round_trip_s") if key in record}
        if "memory_bytes" in rates:
            rates["memory_bytes"] = int(rates["memory_bytes"])
        times = record.get("ffn_times", [])
        if not isinstance(times, list):
            raise ConfigError(f"profile {path}: ffn_times must be a list, got {type(times).__name__}")
        return cls(
            name=str(record.get("name", path.stem)),
            link_bytes_per_s=_number(record, "link_bytes_per_s", path, zero=True),
            ffn_times=tuple(_ffn_times(entry, path) for entry in times),
            **rates,
        )


def _number(record: dict[str, Any], key: str, path: Path, zero: bool = False) -> float:
    value = record.get(key)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not zero):
        wanted = "a positive number, or 0 for no limit" if zero else "a positive number"
        raise ConfigError(f"profile {path}: {key} must be {wanted}, got {value!r}")
    return value


def _ffn_times(entry: Any, path: Path) -> FFNTimes:
    try:
        dtype = getattr(torch, str(entry.get("dtype", "bfloat16")), None)
        times = FFNTimes(
            int(entry["hidden_size"]),
            int(entry["intermediate_size"]),
            bool(entry.get("gated", True)),
            tuple(int(n) for n in entry["rows"]),
            tuple(float(s) for s in entry["seconds"]),
            dtype,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"profile {path}: an entry of ffn_times needs hidden_size, intermediate_size, rows and seconds ({error!r})"
        ) from error
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"profile {path}: dtype {entry['dtype']!r} is none of torch's; expected one like 'bfloat16'")
    ascending = all(a < b for a, b in zip(times.rows, times.rows[1:], strict=False))
    if not times.rows or len(times.rows) != len(times.seconds) or not ascending or min(times.rows) < 1:
        raise ConfigError(f"profile {path}: rows must ascend from 1 or more, with as many seconds; got {entry!r}")
    if not all(0 < s < float("inf") for s in times.seconds):
        raise ConfigError(f"profile {path}: seconds must be positive, got {list(times.seconds)}")
    return times

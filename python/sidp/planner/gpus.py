"""What a GPU has: datasheet figures cut to what was attained, or a profile that was measured."""

from __future__ import annotations

import bisect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError

# Of the datasheet's "GB", read as GiB, CUDA offers a little less: 79.11 of 80 on an H100.
_MEMORY_SEEN = 79.11 / 80
# Measured on one H100: 600 of 989 TFLOP/s in the GEMMs of an FFN, 3065 of 3350 GB/s of HBM with large copies.
_FLOPS_ATTAINED = 600 / 989
_HBM_ATTAINED = 3065 / 3350
MEASURED_RATES = ("memory_bytes", "hbm_bytes_per_s", "flops_per_s", "link_bytes_per_s")


@dataclass(frozen=True)
class FFNTimes:
    """Measured seconds of one FFN (as one GPU computes it) at numbers of rows, ascending."""

    hidden: int
    inner: int
    gated: bool
    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rows: int) -> float:
        """Between two measurements on the line that joins them; beyond the last in proportion to the rows."""
        if rows <= self.rows[0]:
            return self.seconds[0]
        if rows >= self.rows[-1]:
            return self.seconds[-1] * rows / self.rows[-1]
        after = bisect.bisect_right(self.rows, rows)
        (r0, r1), (s0, s1) = self.rows[after - 1 : after + 1], self.seconds[after - 1 : after + 1]
        return s0 + (s1 - s0) * (rows - r0) / (r1 - r0)


@dataclass(frozen=True)
class GPU:
    """Attainable rates of one GPU, not peaks; `source` says where they come from.

    `link_bytes_per_s` is what one reader gets over its link, one way; `round_trip_s` what an empty CaS request takes.
    """

    name: str
    memory_bytes: int
    hbm_bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float
    source: str
    round_trip_s: float = 2e-6
    ffn_times: tuple[FFNTimes, ...] = field(default=(), repr=False)

    def times_of(self, hidden: int, inner: int, gated: bool) -> FFNTimes | None:
        return next((t for t in self.ffn_times if (t.hidden, t.inner, t.gated) == (hidden, inner, gated)), None)


def _sheet(name: str, gib: int, hbm_tb: float, tflops: float, link_gb: float, attained_gb: float) -> GPU:
    source = (
        f"datasheet ({gib} GB, {hbm_tb:g} TB/s HBM, {tflops:g} dense bf16 TFLOP/s, NVLink {link_gb:g} GB/s one way), "
        f"cut to what was attained: {_HBM_ATTAINED:.0%} of HBM and {_FLOPS_ATTAINED:.0%} of FLOP/s on an H100, "
        f"{attained_gb:g} GB/s of NVLink"
    )
    return GPU(
        name,
        int(gib * 2**30 * _MEMORY_SEEN),
        hbm_tb * 1e12 * _HBM_ATTAINED,
        tflops * 1e12 * _FLOPS_ATTAINED,
        attained_gb * 1e9,
        source,
    )


# NVLink attained: the middle of published copy-engine runs (H100 369-381, H200 379, B200 692-726 GB/s); the H20 has the
# H100's NVLink.
GPUS = {
    "h20": _sheet("h20", 96, 4.0, 148, 450, 375),
    "h20-141": _sheet("h20-141", 141, 4.0, 148, 450, 375),
    "h100": _sheet("h100", 80, 3.35, 989, 450, 375),
    "h200": _sheet("h200", 141, 4.8, 989, 450, 379),
    "b200": _sheet("b200", 180, 7.7, 2250, 900, 709),
}


def load_gpu(name: str, profile: str | None = None) -> GPU:
    """A GPU of the table, or "measured" with the path of a profile. Raises ConfigError."""
    if name == "measured":
        if profile is None:
            raise ConfigError("--gpu measured needs --profile FILE.json with the measured rates")
        return _measured(Path(profile))
    if profile is not None:
        raise ConfigError(f"--profile {profile} goes with --gpu measured, not with --gpu {name}")
    if name not in GPUS:
        raise ConfigError(f"--gpu is {name!r}, expected one of {', '.join(GPUS)}, measured")
    return GPUS[name]


def _measured(path: Path) -> GPU:
    """A profile: the four rates, `name`, `round_trip_s` and a list `ffn_times` if there are any."""
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"profile {path} cannot be read as JSON: {error}") from error
    if not isinstance(profile, dict):
        raise ConfigError(f"profile {path} holds a {type(profile).__name__}, expected a JSON object")
    rates = {key: _positive(profile, key, path) for key in MEASURED_RATES}
    rates["memory_bytes"] = int(rates["memory_bytes"])
    times = profile.get("ffn_times", [])
    if not isinstance(times, list):
        raise ConfigError(f"profile {path}: ffn_times must be a list, got {type(times).__name__}")
    if "round_trip_s" in profile:
        rates["round_trip_s"] = _positive(profile, "round_trip_s", path)
    return GPU(
        name=str(profile.get("name", path.stem)),
        source=f"measured, {path.name}",
        ffn_times=tuple(_ffn_times(entry, path) for entry in times),
        **rates,
    )


def _positive(profile: dict[str, Any], key: str, path: Path) -> float:
    value = profile.get(key)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        raise ConfigError(f"profile {path}: {key} must be a positive number, got {value!r}")
    return value


def _ffn_times(entry: Any, path: Path) -> FFNTimes:
    try:
        times = FFNTimes(
            int(entry["hidden_size"]),
            int(entry["intermediate_size"]),
            bool(entry.get("gated", True)),
            tuple(int(n) for n in entry["rows"]),
            tuple(float(s) for s in entry["seconds"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"profile {path}: an entry of ffn_times needs hidden_size, intermediate_size, rows and seconds ({error!r})"
        ) from error
    ascending = all(a < b for a, b in zip(times.rows, times.rows[1:], strict=False))
    if not times.rows or len(times.rows) != len(times.seconds) or not ascending or min(times.rows) < 1:
        raise ConfigError(f"profile {path}: rows must ascend from 1 or more, with as many seconds; got {entry!r}")
    if not all(0 < s < float("inf") for s in times.seconds):
        raise ConfigError(f"profile {path}: seconds must be positive, got {list(times.seconds)}")
    return times

"""From the input and what the output already holds to the work: valid requests, longest first, in one scratch file."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import ConfigError
from . import writer
from .reading import read_rows
from .records import BadRow, Defaults, Request, Row, parse_row
from .responses import row_error_line


@dataclass(frozen=True)
class Work:
    """What a run has to do. `extents`: (offset, bytes) of each request in the spool file and the tokens it will hold at its end,
    about; longest first.
    """

    rows: int
    done_before: int
    refused: int
    extents: list[tuple[int, int, int]] = field(repr=False)
    samples: bool = False  # some request needs more than the most likely token
    filters: bool = False  # some request has top_p or top_k
    mean_cost: int = 0  # tokens of a request


def prepare_work(
    source: str | Path,
    output: str | Path,
    spool: str | Path,
    defaults: Defaults,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Work:
    """Check every row, answer the bad ones in `output`, and put the requests that are left into `spool`.

    ConfigError for files that cannot be read or written, or an output that does not belong to the input.
    """
    if os.path.exists(source) and os.path.exists(output) and os.path.samefile(source, output):
        raise ConfigError(f"input and output are both {source}: give the output another name")
    rows = _rows(source, defaults)
    if not rows:
        raise ConfigError(f"input {source} has no request: expected JSON lines, one request a line")
    done = writer.prepare(output, {row.key for row in rows}, resume=resume, overwrite=overwrite)
    left = [row for row in rows if row.key not in done]
    refused = [row for row in left if row.request is None]
    _answer(output, refused)
    requests = sorted((row.request for row in left if row.request is not None), key=Request.cost, reverse=True)
    extents = _write_spool(spool, requests)
    return Work(
        rows=len(rows),
        done_before=len(rows) - len(left),
        refused=len(refused),
        extents=extents,
        samples=any(r.samples for r in requests),
        filters=any(r.samples and (r.top_p < 1 or r.top_k > 0) for r in requests),
        mean_cost=sum(map(Request.cost, requests)) // max(1, len(requests)),
    )


def _rows(source: str | Path, defaults: Defaults) -> list[Row]:
    """All rows; the second of two with the same name of its own is refused, since answers could not be told apart."""
    rows: list[Row] = []
    equal: Counter[bytes] = Counter()
    first: dict[str, int] = {}
    for number, raw in read_rows(source):
        raw = raw.strip()
        row = parse_row(raw, number, defaults, occurrence=equal[raw])
        equal[raw] += 1
        if row.explicit and row.error is None:
            before = first.setdefault(row.custom_id, number)
            if before != number:
                text = f"custom_id {row.custom_id!r} is taken by line {before}: every request needs its own"
                row = replace(row, request=None, error=BadRow(text, "custom_id", "duplicate_custom_id"))
        rows.append(row)
    return rows


def _answer(output: str | Path, refused: list[Row]) -> None:
    if not refused:
        return
    file = writer.Output(output)
    try:
        for row in refused:
            file.append(row_error_line(row))
    finally:
        file.close()


def _write_spool(spool: str | Path, requests: list[Request]) -> list[tuple[int, int, int]]:
    extents, offset = [], 0
    with open(os.open(spool, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        for request in requests:
            line = request.to_json()
            file.write(line)
            extents.append((offset, len(line), request.cost()))
            offset += len(line)
    return extents


class Spool:
    """The spool file open for reading."""

    def __init__(self, path: str | Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def request(self, extent: tuple[int, int]) -> Request:
        offset, size = extent
        return Request.from_json(os.pread(self._fd, size, offset))

    def close(self) -> None:
        os.close(self._fd)

"""What a torch.profiler trace holds, as a table: calls of the CUDA API, kernels and copies, and whether anything waited.

python bench/trace_table.py TRACE.json [RANGE]      # only what begins within the record_function range RANGE
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

# Whoever calls one of these stops until the device has done something.
WAITS = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cuCtxSynchronize",
    "cuStreamSynchronize",
    "cuEventSynchronize",
    "cudaMemcpy",
    "cudaFree",
)
_API, _DEVICE = ("cuda_runtime", "cuda_driver"), ("kernel", "gpu_memcpy", "gpu_memset")


def table(path: str | Path, within: str | None = None) -> list[tuple[str, str, int, float]]:
    """(category, name, count, milliseconds), longest first; device work belongs to the call that launched it.

    Raises ValueError where the trace has no range named ``within``.
    """
    events = [event for event in json.loads(Path(path).read_text())["traceEvents"] if event.get("ph") == "X"]
    begin, end = float("-inf"), float("inf")
    if within is not None:
        ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"] == within]
        if not ranges:
            raise ValueError(f"{path} has no range named {within!r}")
        begin, end = ranges[0]["ts"], ranges[0]["ts"] + ranges[0]["dur"]
    calls = [e for e in events if e.get("cat") in _API and begin <= e["ts"] <= end]
    launched = {e["args"].get("correlation") for e in calls}
    work = [e for e in events if e.get("cat") in _DEVICE and e["args"].get("correlation") in launched]
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for event in calls + work:
        entry = sums[event["cat"], event["name"][:80]]
        entry[0] += 1
        entry[1] += event.get("dur", 0) / 1e3
    rows = [(category, name, int(count), ms) for (category, name), (count, ms) in sums.items()]
    return sorted(rows, key=lambda row: (row[0], -row[3]))


def waits(rows: list[tuple[str, str, int, float]]) -> list[str]:
    """Names of the calls of a table that make the host wait."""
    return [name for category, name, _, _ in rows if category in _API and name in WAITS]


if __name__ == "__main__":
    found = table(*sys.argv[1:3])
    for category, name, count, ms in found:
        print(f"{category:12} {count:6} {ms:10.3f} ms  {name}")
    print("the host waited in:", ", ".join(waits(found)) or "nothing")

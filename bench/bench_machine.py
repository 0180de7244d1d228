"""The figures of `sidp bench` as pytest-benchmark tests. Run: python -m pytest bench/bench_machine.py [--benchmark-json=FILE]

Each prints what it found and keeps it in `extra_info`; what the machine cannot measure is skipped with the reason.
"""

from __future__ import annotations

import pytest
import torch

from sidp.cli import bench, bench_copies, bench_pool
from sidp.device import choose_device

pytestmark = pytest.mark.timeout(600)

DEVICE = choose_device(None)
ON_GPU = DEVICE.type == "cuda"
NBYTES = (256 if ON_GPU else 64) << 20
SHAPE = (5120, 25600) if ON_GPU else (512, 2560)
ROUNDS = 5


def record(benchmark, run):
    found = benchmark.pedantic(run, rounds=1)
    print()
    for result in found:
        print(bench._line(result))
        benchmark.extra_info[result["what"]] = {key: value for key, value in result.items() if key != "what"}
    if all("waived" in result for result in found):
        pytest.skip("; ".join(result["waived"] for result in found))


def test_copies(benchmark):
    record(benchmark, lambda: bench_copies.copies(DEVICE, NBYTES, ROUNDS))


def test_copies_between_gpus(benchmark):
    record(benchmark, lambda: bench_copies.between_gpus(DEVICE, NBYTES, ROUNDS))


def test_pools(benchmark):
    record(benchmark, lambda: bench_pool.pools(DEVICE, *SHAPE, ROUNDS))


def test_time_by_rows(benchmark):
    def run():
        times = zip(*bench_pool.ffn_times(DEVICE, *SHAPE, ROUNDS), strict=True)
        return [{"what": f"FFN, {rows} rows", "ms": seconds * 1e3} for rows, seconds in times]

    with torch.inference_mode():
        record(benchmark, run)

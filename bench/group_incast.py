"""The part `incast` of bench/group_gpu.py: one owner read by several ranks at once, and what peak shifting is worth.

First bare copies: the ranks 1 ... k read from rank 0 together. Then iterations by WaS, link-bound, with peak shifting on and
off: the paper's case is ranks in step and a ring that looks one layer ahead.

  step=layer       all ranks wait for each other before every layer
  step=iteration   before every iteration
  step=none        they drift
  step=staggered   rank r starts each iteration r / D of an iteration later (a barrier, then a pause)
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from sidp import ffn_forward

ROWS = 64  # few enough for every iteration to be bound by the link
CASES = [
    (2, "layer"),
    (2, "iteration"),
    (2, "none"),
    (None, "layer"),
    (None, "iteration"),
    (None, "none"),
    (None, "staggered"),
]


def bare(group) -> None:
    with group.open(mode="was", placement="layer", slots=1) as pool:
        for readers in range(1, group.args.ranks):
            slowest = group.copy_rate(pool, 0, reads=1 <= group.rank <= readers)
            group.report(
                part="incast", readers=readers, slowest_gbps=slowest / 1e9, owner_gives_gbps=readers * slowest / 1e9
            )


def iterations(group) -> None:
    x = group.x(ROWS)
    for placement in group.args.placements:
        for slots, step in CASES if placement == "layer" else [(None, "layer"), (None, "iteration")]:
            if group.spent():
                return
            took = {}
            for shifting in (True, False) if placement == "layer" else (True,):
                with group.open(mode="was", placement=placement, slots=slots, peak_shifting=shifting) as pool:
                    took[shifting] = group.slowest(_median(group, pool, x, step, took.get(True, 0.0)))
                    used = pool.slots
            group.report(
                part="incast", placement=placement, slots=used, step=step, shifted=took[True], plain=took.get(False),
                plain_over_shifted=took[False] / took[True] if False in took else None,
            )  # fmt: skip


def _median(group, pool, x, step: str, expected_ms: float) -> float:
    """Milliseconds of an iteration, waits for others included where the case asks for them."""
    layers, repeats = group.args.layers, group.args.repeats
    pause = (expected_ms or 10.0) * group.rank / group.args.ranks * 1e-3 if step == "staggered" else 0.0
    times = []
    for i in range(repeats + 2):
        if step != "none":
            torch.cuda.current_stream().synchronize()
            dist.barrier()
            time.sleep(pause)
        begin = time.perf_counter()
        for layer in range(layers):
            ffn_forward(x, pool, layer)
            if step == "layer" and layer + 1 < layers:
                torch.cuda.current_stream().synchronize()
                dist.barrier()
        torch.cuda.current_stream().synchronize()
        if i >= 2:
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def incast(group) -> None:
    bare(group)
    iterations(group)

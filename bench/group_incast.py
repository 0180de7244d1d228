"""The part `incast` of bench/group_gpu.py: one owner read by several ranks at once, and what peak shifting is worth.

First bare copies: the ranks 1 ... k read from rank 0 together. Then iterations by WaS, link-bound, with peak shifting on and
off: the paper's case is ranks in step and a ring that looks one layer ahead.

  step=layer       all ranks wait for each other before every layer
  step=iteration   before every iteration
  step=none        they drift
  step=staggered   rank r starts each iteration r / D of an iteration later (a barrier, then a pause)

Every case runs without turns at owners and with them (`turns`, SIDP_TURNS), the former being what the paper has.
"""

from __future__ import annotations

import os
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
    for slots, step in CASES if "layer" in group.args.placements else []:
        for turns in (0, 1):
            shifted, used = _case(group, "layer", slots, step, turns, 0.0, True)
            plain, _ = _case(group, "layer", slots, step, turns, shifted, False)
            group.report(
                part="incast", placement="layer", slots=used, step=step, turns=turns, shifted=shifted, plain=plain,
                plain_over_shifted=plain / shifted,
            )  # fmt: skip
        if group.spent():
            return
    for step in ("layer", "iteration", "none") if "striped" in group.args.placements else []:
        for turns in (0, 1):
            took, used = _case(group, "striped", None, step, turns, 0.0, True)
            group.report(part="incast", placement="striped", slots=used, step=step, turns=turns, took=took)
        if group.spent():
            return


def _case(group, placement: str, slots, step: str, turns: int, expected_ms: float, shifting: bool) -> tuple[float, int]:
    """Milliseconds of an iteration of the slowest rank, and the pool's slots."""
    os.environ["SIDP_TURNS"] = str(turns)
    try:
        with group.open(mode="was", placement=placement, slots=slots, peak_shifting=shifting) as pool:
            return group.slowest(_median(group, pool, group.x(ROWS), step, expected_ms)), pool.slots
    finally:
        del os.environ["SIDP_TURNS"]


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

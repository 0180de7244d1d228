"""The simulator against the CPU backend: iterations of 4 processes under capped links. Run: python bench/sim_validation.py

SIDP_CPU_LINK_GBPS caps what a reader takes in, SIDP_CPU_OWNER_GBPS what an owner gives out to all of its readers. A layer's compute
is a sleep, so that four ranks fit two cores; the simulator is given the sleep as it really takes (the mean of every rank's), the
caps as one reader alone attains them (a capped copy oversleeps), the placement, the slots and its usual jitter. Nothing is
fitted to the iterations. --h100 compares with the recorded iterations of one H100 and its host tier, and runs nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch

from sidp import FFNSpec, PoolConfig, WeightPool
from sidp._native import C
from sidp.launch import launch
from sidp.shares import unit_layout
from sidp.simulate.machine import Engine

RANKS, LAYERS, WARM = 4, 16, 3
SPEC = FFNSpec(256, 1024, dtype=torch.float32)  # 3.1 MB
# placement, peak shifting, slots, link GB/s, owner GB/s, sleep ms
CASES = (
    ("layer", True, 6, 0, 0.3, 5),
    ("layer", False, 6, 0, 0.3, 5),
    ("layer", True, 6, 0, 0.15, 5),
    ("layer", False, 6, 0, 0.15, 5),
    ("striped", True, 3, 0, 0.15, 5),
    ("striped", True, 3, 0.3, 0, 5),
    ("layer", True, 6, 0.3, 0, 5),
    ("layer", True, 6, 0.6, 0, 20),
)


def _measure(context, placement, shifting, slots, sleep_s, iterations):
    """Seconds of an iteration, and of a sleep, on this rank."""
    import torch.distributed as dist

    pool = WeightPool(
        [SPEC] * LAYERS, config=PoolConfig(mode="was", placement=placement, peak_shifting=shifting, slots=slots)
    )
    for layer in range(LAYERS):
        if placement == "striped" or pool.owns(layer):
            pool.load(layer, {t.name: torch.zeros(t.shape) for t in SPEC.unit().tensors})
    pool.commit()
    slept = []
    for index in range(WARM + iterations):
        if index == WARM:
            dist.barrier()
            start = time.perf_counter()
        for layer in range(LAYERS):
            pool.acquire(layer)
            before = time.perf_counter()
            time.sleep(sleep_s)
            slept.append(time.perf_counter() - before)
            pool.release(layer)
    took = (time.perf_counter() - start) / iterations
    pool.close()
    return took, statistics.mean(slept)


def _attained(context, fetches):
    """GB/s of rank 0, the only reader."""
    import torch.distributed as dist

    with WeightPool([SPEC] * 8, config=PoolConfig(mode="was", slots=1)) as pool:
        for layer in range(8):
            if pool.owns(layer):
                pool.load(layer, {t.name: torch.zeros(t.shape) for t in SPEC.unit().tensors})
        pool.commit()
        pool.start_trace()
        for index in range(fetches if context.rank == 0 else 0):
            layer = 2 * (index % 4) + 1
            pool.acquire(layer)
            pool.release(layer)
        took = [end - start for kind, _, _, start, end in pool.trace() if kind == "fetch"]
        dist.barrier()
    return SPEC.unit().nbytes / statistics.median(took) / 1e9 if took else 0.0


def _simulate(placement, shifting, slots, link, owner, sleep_s, iterations) -> float:
    units = [unit_layout(SPEC.unit())] * LAYERS
    native = C.Placement(placement, units, RANKS)
    job = C.SimJob()
    table = C.TimeTable([(1, sleep_s)])
    nothing = C.TimeTable([(1, 1e-9)])
    job.compute.ffn, job.compute.serve, job.compute.rest, job.compute.once = table, table, nothing, nothing
    job.fabric.ingress_bytes_per_s, job.fabric.egress_bytes_per_s = link * 1e9, owner * 1e9
    job.options.reach, job.options.peak_shifting, job.options.trace = C.SimReach.was, shifting, True
    job.options.jitter = Engine().jitter
    job.slots, job.kv_tokens = [slots] * RANKS, [10**6] * RANKS
    job.requests = [C.SimRequest(0, 1, WARM + iterations, rank=rank) for rank in range(RANKS)]
    result = C.simulate(native, job)
    mine = ([i for i in result.iterations if i.rank == rank] for rank in range(RANKS))
    return max((i[-1].end - i[WARM].begin) / iterations for i in mine)


def _h100() -> None:
    """bench/RESULTS.md, WaS on one H100: 12 layers of 786 MB from pinned memory at 54.5 GB/s, 3 slots; milliseconds."""
    spec = FFNSpec(5120, 25600)
    placement = C.Placement("striped", [unit_layout(spec.unit())] * 12, 2)
    print("| rows | compute alone | measured eager | measured graph | simulated | error eager | error graph |")
    print("|---|---|---|---|---|---|---|")
    for rows, compute, eager, graph in (
        (256, 4.4, 174.9, 204.9),
        (1024, 13.4, 182.3, 174.8),
        (4096, 56.9, 180.5, 174.8),
        (8192, 111.6, 189.2, 171.7),
        (16384, 226.1, 245.0, 244.3),
    ):
        job = C.SimJob()
        nothing, table = C.TimeTable([(1, 1e-9)]), C.TimeTable([(1, compute / 12e3)])
        job.compute.ffn, job.compute.serve, job.compute.rest, job.compute.once = table, table, nothing, nothing
        # one reader of every whole unit: half of it is its own stripe, so the other half comes at half the rate
        job.fabric.ingress_bytes_per_s = job.fabric.egress_bytes_per_s = 54.5e9 / 2
        job.options.reach, job.options.trace = C.SimReach.was, True
        job.slots, job.kv_tokens, job.requests = [3, 3], [100, 100], [C.SimRequest(0, 1, 10, rank=0)]
        done = C.simulate(placement, job).iterations
        simulated = (done[-1].end - done[2].end) / 7 * 1e3
        errors = (f"{simulated / measured - 1:+.1%}" for measured in (eager, graph))
        print(f"| {rows} | {compute} | {eager} | {graph} | {simulated:.1f} | {' | '.join(errors)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--h100", action="store_true")
    args = parser.parse_args()
    if args.h100:
        _h100()
        return
    iterations = args.iterations
    print(
        f"{RANKS} ranks, {LAYERS} layers of {SPEC.unit().nbytes / 1e6:.1f} MB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    print(
        "| placement | shifting | slots | link, owner GB/s | attained | measured ms | simulated ms | error |\n|---|---|---|---|---|---|---|"
    )
    errors, attained = [], {}
    for placement, shifting, slots, link, owner, sleep_ms in CASES:
        for name, value in (("LINK", link), ("OWNER", owner)):
            os.environ[f"SIDP_CPU_{name}_GBPS"] = str(value)
        caps = (link, owner)
        if caps not in attained:
            attained[caps] = launch(_attained, 2, (40,))[0] / min(cap for cap in caps if cap)
        share = attained[caps]
        results = launch(_measure, RANKS, (placement, shifting, slots, sleep_ms / 1e3, iterations))
        measured = max(took for took, _ in results)
        simulated = _simulate(
            placement, shifting, slots, link, owner, statistics.mean(s for _, s in results), iterations
        )
        errors.append(simulated / measured - 1)
        print(
            f"| {placement} | {'yes' if shifting else 'no'} | {slots} | {link or '-'}, {owner or '-'} | {share:.2f} | {measured * 1e3:.1f} | {simulated * 1e3:.1f} | {errors[-1]:+.1%} |",
            flush=True,
        )
    print(f"largest error {max(map(abs, errors)):.1%}, median {statistics.median(map(abs, errors)):.1%}")


if __name__ == "__main__":
    main()

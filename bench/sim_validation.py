"""The simulator against the CPU backend: iterations of 4 processes under capped links. Run: python bench/sim_validation.py

SIDP_CPU_LINK_GBPS caps what a reader takes in, SIDP_CPU_OWNER_GBPS what an owner gives out to all of its readers. A layer's compute
is a sleep, so that four ranks fit two cores. The simulator is given the placement, the slots, the caps, the copy engine's slices, and
what runs of another shape showed just before and after: in two groups of two, where every owner has one reader, how much longer
than its bytes a slice takes, and how late a waiting thread wakes. Sleeps are drawn from those that this case's ranks measured, and ranks start as far apart as they did.
Nothing is fitted to an iteration; of what the draws give, the median over seeds is shown, and the range. Every case runs in
rounds. Shown is the one in which sleeps and slices were late least, whatever its error, and beside it the median error of all
rounds: other work on the machine comes in bursts, and whether a group of few iterations falls out of step is a matter of luck. --recorded compares with
recorded iterations of one and of two GPUs, and runs nothing.
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

RANKS, LAYERS, WARM, SEEDS, ROUNDS = 4, 16, 3, 9, 5
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


def _load(pool, placement):
    for layer in range(pool.num_layers):
        if placement == "striped" or pool.owns(layer):
            pool.load(layer, {t.name: torch.zeros(t.shape) for t in SPEC.unit().tensors})
    pool.commit()


def _measure(placement, shifting, slots, sleep_s, iterations):
    """Seconds of an iteration, and of every sleep, on this rank, and when it began."""
    pool = WeightPool(
        [SPEC] * LAYERS, config=PoolConfig(mode="was", placement=placement, peak_shifting=shifting, slots=slots)
    )
    _load(pool, placement)
    slept, began = [], time.monotonic()
    for index in range(WARM + iterations):
        if index == WARM:
            start = time.perf_counter()
        for layer in range(LAYERS):
            pool.acquire(layer)
            before = time.perf_counter()
            time.sleep(sleep_s)
            slept.append(time.perf_counter() - before)
            pool.release(layer)
    took = (time.perf_counter() - start) / iterations
    pool.close()
    return took, slept, began


def _case(context, placement, shifting, slots, sleep_s, cap, iterations):
    import torch.distributed as dist

    groups = [dist.new_group([first, first + 1]) for first in range(0, RANKS, 2)]
    pair = groups[context.rank // 2]
    seen, rounds = [_calibrate(pair, sleep_s, cap)], []
    for _ in range(ROUNDS):
        took, slept, began = _measure(placement, shifting, slots, sleep_s, iterations)
        seen.append(_calibrate(pair, sleep_s, cap))
        pauses, wakes = (seen[-2][part] + seen[-1][part] for part in (0, 1))
        rounds.append((took, slept, pauses, wakes, began))
    return rounds


def _calibrate(pair, sleep_s, cap, forwards=4):
    """In groups of two: seconds a slice took beyond its bytes, by fetch; seconds from a fetch's end to the end of a stall on it."""
    import torch.distributed as dist

    pool = WeightPool([SPEC] * LAYERS, group=pair, config=PoolConfig(mode="was", slots=2))
    _load(pool, "layer")
    dist.barrier()
    pool.start_trace()
    for _ in range(forwards):
        for layer in range(LAYERS):
            pool.acquire(layer)
            time.sleep(sleep_s)
            pool.release(layer)
    events = pool.trace()
    dist.barrier()
    pool.close()
    nbytes = SPEC.unit().nbytes
    slices = -(-nbytes // _slice_bytes(cap))
    fetches = [(layer, begin, end) for kind, layer, _, begin, end in events if kind == "fetch"]
    pauses = [max(0.0, end - begin - nbytes / cap) / slices for _, begin, end in fetches]
    ends = {}
    for layer, _, end in fetches:
        ends.setdefault(layer, []).append(end)
    stalls = [(layer, begin, end) for kind, layer, _, begin, end in events if kind == "stall"]
    wakes = [end - e for layer, begin, end in stalls for e in ends.get(layer, ()) if begin < e <= end]
    return pauses, wakes


def _slice_bytes(cap: float) -> float:
    """As csrc/ffn_cache/copy_engine.cpp: a millisecond of the cap, of 16 KiB to 4 MiB."""
    return min(max(cap * 1e-3, 16 << 10), 4 << 20)


def _simulate(
    placement, shifting, slots, link, owner, sleep_s, slept, pauses, wake_s, starts, iterations, seed
) -> float:
    units = [unit_layout(SPEC.unit())] * LAYERS
    native = C.Placement(placement, units, RANKS)
    job = C.SimJob()
    table = C.TimeTable([(1, sleep_s)])
    nothing = C.TimeTable([(1, 1e-9)])
    job.compute.ffn, job.compute.serve, job.compute.rest, job.compute.once = table, table, nothing, nothing
    fabric, options = C.SimFabric(), C.SimOptions()
    fabric.ingress_bytes_per_s, fabric.egress_bytes_per_s = link * 1e9, owner * 1e9
    fabric.slice_bytes = _slice_bytes(min(cap for cap in (link, owner) if cap) * 1e9)
    fabric.slice_pauses = pauses
    options.reach, options.peak_shifting, options.trace = C.SimReach.was, shifting, True
    options.compute_factors, options.wake_s, options.seed = [s / sleep_s for s in slept], wake_s, seed
    job.fabric, job.options = fabric, options
    job.slots, job.kv_tokens, job.starts = [slots] * RANKS, [10**6] * RANKS, starts
    job.requests = [C.SimRequest(0, 1, WARM + iterations, rank=rank) for rank in range(RANKS)]
    result = C.simulate(native, job)
    mine = ([i for i in result.iterations if i.rank == rank] for rank in range(RANKS))
    return max((i[-1].end - i[WARM].begin) / iterations for i in mine)


# bench/RESULTS.md: rows, compute alone, measured eager and graph, ms an iteration; Qwen3-32B-shaped layers of 786 MB
HOST_TIER = (
    (256, 4.5, 170.3, 171.3),
    (1024, 14.1, 170.3, 171.7),
    (4096, 59.7, 170.8, 171.8),
    (8192, 114.1, 170.6, 172.4),
    (16384, 235.1, 244.0, 246.1),
)
NVLINK = (
    (256, 2.21, 7.45, 7.88),
    (1024, 6.82, 9.74, 11.07),
    (2048, 15.39, 15.70, 17.19),
    (4096, 29.72, 30.28, 34.61),
    (8192, 56.60, 60.66, 64.85),
)
# two H200s: the first session has all rows, the second 256, 2048 and 8192 and the present striped copies
H200_FIRST = (
    (256, 3.94, 12.58, 13.07),
    (1024, 14.92, 15.38, 16.02),
    (2048, 29.85, 31.54, 31.89),
    (4096, 59.96, 62.52, 64.33),
    (8192, 119.14, 123.11, 124.35),
)
# four H100s at 397 GB/s, 12 layers, 64 rows (3.7 ms of computing), ranks in step at no time or at every iteration:
# placement, slots, shifted, measured
NODE = (
    ("layer", 2, True, 33.1),
    ("layer", 2, False, 33.6),
    ("layer", 3, True, 36.5),
    ("layer", 3, False, 45.6),
    ("striped", 3, True, 40.5),
)
H200_LAYER = ((256, 3.83, 12.62, 13.07), (2048, 29.70, 30.91, 30.78), (8192, 117.92, 121.20, 121.38))
H200_STRIPED = ((256, 3.83, 13.21, 13.46), (2048, 29.70, 32.85, 33.02), (8192, 117.92, 123.57, 124.07))


def _recorded() -> None:
    print("WaS on one H100: 12 layers from pinned memory at 55.2 GB/s, 3 slots")
    # one reader of every whole unit: half of it is its own stripe, so the other half comes at half the rate
    _print_recorded(HOST_TIER, "striped", 12, 3, 55.2e9 / 2, readers=1)
    print("WaS on two H100s over NVLink at 373.5 GB/s: 6 layers, `layer`, 1 slot")
    _print_recorded(NVLINK, "layer", 6, 1, 373.5e9, readers=2, fit_row=4096)
    for name, rows, placement in (
        ("first session", H200_FIRST, "layer"),
        ("second session", H200_LAYER, "layer"),
        ("second session", H200_STRIPED, "striped"),
    ):
        print(f"WaS on two H200s over NVLink at 372 GB/s, {name}: 12 layers, `{placement}`, 3 slots")
        _print_recorded(rows, placement, 12, 3, 372e9, readers=2)
    print("WaS on four H100s over NVLink at 397 GB/s: 12 layers, 64 rows")
    print(
        "| placement | slots | shifted | measured | simulated, seeds 1 ... 5 | error of their median | owners in turns |"
    )
    print("|---|---|---|---|---|---|---|")
    for placement, slots, shifted, measured in NODE:
        simulated = sorted(_node(placement, slots, shifted, False, seed) for seed in range(1, 6))
        turns = sorted(_node(placement, slots, shifted, True, seed) for seed in range(1, 6))[2]
        span, error = f"{simulated[0]:.1f} ... {simulated[-1]:.1f}", simulated[2] / measured - 1
        print(f"| {placement} | {slots} | {shifted} | {measured} | {span} | {error:+.1%} | {turns:.1f} |")


def _node(placement: str, slots: int, shifted: bool, turns: bool, seed: int) -> float:
    """Milliseconds of an iteration of the slowest of four ranks."""
    native = C.Placement(placement, [unit_layout(FFNSpec(5120, 25600).unit())] * 12, 4)
    job, fabric, options = C.SimJob(), C.SimFabric(), C.SimOptions()
    nothing, table = C.TimeTable([(1, 1e-9)]), C.TimeTable([(1, 3.7e-3 / 12)])
    job.compute.ffn, job.compute.serve, job.compute.rest, job.compute.once = table, table, nothing, nothing
    fabric.ingress_bytes_per_s = fabric.egress_bytes_per_s = 397e9
    fabric.turns = turns
    options.reach, options.trace, options.peak_shifting, options.seed = C.SimReach.was, True, shifted, seed
    options.jitter = 0.02  # as `sidp simulate` assumes
    job.fabric, job.options = fabric, options
    job.slots, job.kv_tokens = [slots] * 4, [100] * 4
    job.requests = [C.SimRequest(0, 1, 30, rank=rank) for rank in range(4)]
    done = C.simulate(native, job).iterations
    mine = ([i for i in done if i.rank == rank][5:] for rank in range(4))
    return max((i[-1].end - i[0].end) / (len(i) - 1) for i in mine) * 1e3


def _print_recorded(recorded, placement, layers, slots, rate, readers, fit_row=None) -> None:
    """`fit_row`: graphs are also simulated with all computing as much slower as that row's iteration is than its compute."""
    native = C.Placement(placement, [unit_layout(FFNSpec(5120, 25600).unit())] * layers, 2)

    def simulate(compute_ms) -> float:
        job = C.SimJob()
        nothing, table = C.TimeTable([(1, 1e-9)]), C.TimeTable([(1, compute_ms / layers / 1e3)])
        job.compute.ffn, job.compute.serve, job.compute.rest, job.compute.once = table, table, nothing, nothing
        fabric, options = C.SimFabric(), C.SimOptions()
        fabric.ingress_bytes_per_s = fabric.egress_bytes_per_s = rate
        options.reach, options.trace = C.SimReach.was, True
        job.fabric, job.options = fabric, options
        job.slots, job.kv_tokens = [slots] * 2, [100] * 2
        job.requests = [C.SimRequest(0, 1, 10, rank=rank) for rank in range(readers)]
        done = [i for i in C.simulate(native, job).iterations if i.rank == 0]
        return (done[-1].end - done[2].end) / 7 * 1e3

    slower = next((graph / compute for rows, compute, _, graph in recorded if rows == fit_row), None)
    heads = ["rows", "compute alone", "measured eager", "measured graph", "simulated", "error eager", "error graph"]
    heads += [f"error graph, computing x {slower:.3f}"] if slower else []
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for rows, compute, eager, graph in recorded:
        simulated = simulate(compute)
        errors = [f"{simulated / measured - 1:+.1%}" for measured in (eager, graph)]
        errors += [f"{simulate(compute * slower) / graph - 1:+.1%}"] if slower else []
        print(f"| {rows} | {compute} | {eager} | {graph} | {simulated:.2f} | {' | '.join(errors)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=12, help="of each round (default: 12)")
    parser.add_argument("--recorded", action="store_true", help="against recorded iterations of GPUs, running nothing")
    args = parser.parse_args()
    if args.recorded:
        _recorded()
        return
    iterations = args.iterations
    print(
        f"{RANKS} ranks, {LAYERS} layers of {SPEC.unit().nbytes / 1e6:.1f} MB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    print(
        "| placement | shifting | slots | link, owner GB/s | a sleep, ms | pause, us | wake, us | measured ms | simulated ms | seeds | error | of all rounds |"
    )
    print(f"|{'---|' * 12}")
    errors, medians = [], []
    for placement, shifting, slots, link, owner, sleep_ms in CASES:
        for name, value in (("LINK", link), ("OWNER", owner)):
            os.environ[f"SIDP_CPU_{name}_GBPS"] = str(value)
        cap = min(cap for cap in (link, owner) if cap) * 1e9
        results = launch(_case, RANKS, (placement, shifting, slots, sleep_ms / 1e3, cap, iterations))
        rounds = []
        for of_ranks in zip(*results, strict=True):
            slept, pauses, wakes = ([x for rank in of_ranks for x in rank[part]] for part in (1, 2, 3))
            wake_s = statistics.mean(wakes or [0.0])
            began = [rank[4] for rank in of_ranks]
            starts = [one - min(began) for one in began]
            given = (placement, shifting, slots, link, owner, sleep_ms / 1e3, slept, pauses, wake_s, starts, iterations)
            runs = [_simulate(*given, seed) for seed in range(SEEDS)]
            late = (statistics.mean(slept) - sleep_ms / 1e3) + statistics.mean(pauses)
            rounds.append((late, max(rank[0] for rank in of_ranks), runs, slept, pauses, wake_s))
        _, measured, runs, slept, pauses, wake_s = min(rounds, key=lambda r: r[0])
        simulated = statistics.median(runs)
        errors.append(simulated / measured - 1)
        medians.append(statistics.median(statistics.median(r[2]) / r[1] - 1 for r in rounds))
        print(
            f"| {placement} | {'yes' if shifting else 'no'} | {slots} | {link or '-'}, {owner or '-'} "
            f"| {statistics.mean(slept) * 1e3:.2f} | {statistics.mean(pauses) * 1e6:.0f} | {wake_s * 1e6:.0f} "
            f"| {measured * 1e3:.1f} | {simulated * 1e3:.1f} | {min(runs) * 1e3:.0f}-{max(runs) * 1e3:.0f} | {errors[-1]:+.1%} | {medians[-1]:+.1%} |",
            flush=True,
        )
    for name, of in (("quietest rounds", errors), ("medians over rounds", medians)):
        print(f"{name}: largest error {max(map(abs, of)):.1%}, median {statistics.median(map(abs, of)):.1%}")


if __name__ == "__main__":
    main()

"""The host tier on one GPU: Qwen3-32B-shaped layers against compute alone, the bare pinned copy, and both side by side.

  python bench/was_gpu.py [--parts overlap slices host]

Prints JSON lines. Times are medians by CUDA events over whole iterations, in ms. Three floors: `compute` (the FFNs without a
pool), `link` (a bare pinned copy of the same bytes), and `both` (the same FFNs beside the same bare copies, without any ring:
what the device itself loses when it does both). `ratio` = pooled / max(compute, link), `of_both` = pooled / both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time

import torch
from gpu_clock import Clock

from sidp import FFNSpec, PoolConfig, WeightPool, ffn_forward
from sidp.ffn import apply_formula


def report(**fields):
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in fields.items()}), flush=True)


def samples(run, repeats):
    """Milliseconds of each run after one that is not counted."""
    times = []
    for i in range(repeats + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        if i:
            times.append(begin.elapsed_time(end))
    return times


def timed(run, repeats):
    return statistics.median(samples(run, repeats))


class Bench:
    def __init__(self, args):
        self.args = args
        self.spec = FFNSpec(args.hidden, args.inner)
        unit = self.spec.unit()
        self.unit = {
            t.name: (torch.randn(t.shape, device="cuda") * t.shape[-1] ** -0.5).to(t.dtype) for t in unit.tensors
        }
        self.nbytes = unit.nbytes
        self.host = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=True)
        self.target = torch.empty(self.nbytes, dtype=torch.uint8, device="cuda")
        self.side = torch.cuda.Stream()

    # -- floors --

    def copy_bare(self, layers):
        for _ in range(layers):
            self.target.copy_(self.host, non_blocking=True)

    def compute(self, x, layers):
        for _ in range(layers):
            apply_formula(x, self.unit, self.spec)

    def compute_beside_copies(self, x, layers):
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            self.copy_bare(layers)
        self.compute(x, layers)
        torch.cuda.current_stream().wait_stream(self.side)

    # -- pools --

    def pool(self, layers, hand_over="events", slice_mb="0", slots=3):
        os.environ.update(SIDP_HAND_OVER=hand_over, SIDP_SLICE_MB=slice_mb)
        begin = time.monotonic()
        pool = WeightPool([self.spec] * layers, config=PoolConfig(mode="was", host_tier=True, slots=slots))
        for layer in range(layers):
            pool.load(layer, self.unit)
        pool.commit()
        report(what="load and commit", layers=layers, seconds=time.monotonic() - begin)
        return pool

    def check(self, pool, x):
        for layer in (0, pool.num_layers - 1):
            if not torch.equal(ffn_forward(x, pool, layer), apply_formula(x, self.unit, self.spec)):
                raise SystemExit(f"layer {layer} is not bit-identical to the unpooled one: timings would mean nothing")

    def ring_alone(self, pool, bare):
        fetched, repeats = pool.stats().fetched_bytes, self.args.repeats
        ms = timed(lambda: empty(pool), repeats)
        if pool.stats().fetched_bytes - fetched < repeats * pool.num_layers * self.nbytes:
            raise SystemExit("the ring did not fetch every layer of every iteration: timings would mean nothing")
        return {"ms": ms, "gb_s": pool.num_layers * self.nbytes / ms / 1e6, "of_bare": bare / ms}


def empty(pool):
    for layer in range(pool.num_layers):
        pool.acquire(layer)
        pool.release(layer)


def forward(x, pool):
    for layer in range(pool.num_layers):
        ffn_forward(x, pool, layer)


def overlap(bench):
    """Eager before any graph exists, in graphs, and eager after; the floors are measured beside each row."""
    args, layers = bench.args, bench.args.layers
    pool = bench.pool(layers)
    bare = timed(lambda: bench.copy_bare(layers), args.repeats)
    report(what="bare pinned copy", ms=bare, gb_s=layers * bench.nbytes / bare / 1e6)
    report(what="ring without compute", **bench.ring_alone(pool, bare))
    inputs = {n: torch.randn(n, args.hidden, device="cuda", dtype=torch.bfloat16) for n in args.rows}

    def row(what, rows, run):
        x, repairs = inputs[rows], pool.stats().repairs
        with Clock() as clock:
            alone = timed(lambda: bench.compute(x, layers), args.repeats)
        before = clock.figures()
        link = timed(lambda: bench.copy_bare(layers), args.repeats)
        with Clock() as clock:
            both = timed(lambda: bench.compute_beside_copies(x, layers), args.repeats)
        beside = clock.figures()
        with Clock() as clock:
            times = samples(run, args.repeats)
        pooled = statistics.median(times)
        report(what=what, rows=rows, compute=alone, link=link, both=both, pooled=pooled, ratio=pooled / max(alone, link),
               of_both=pooled / both, samples=[round(ms, 1) for ms in times], clock_alone=before, clock_both=beside,
               clock_pooled=clock.figures(), repairs=pool.stats().repairs - repairs)  # fmt: skip

    for rows in args.rows:
        bench.check(pool, inputs[rows])
        row("eager", rows, lambda rows=rows: forward(inputs[rows], pool))
    gaps(pool, inputs[args.rows[-2]], args.rows[-2], "eager")
    for rows in args.rows:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward(inputs[rows], pool)
        row("graph", rows, graph.replay)
        torch.cuda.synchronize()
        del graph
    for rows in args.rows[1:4:2]:
        row("eager after graphs", rows, lambda rows=rows: forward(inputs[rows], pool))
    gaps(pool, inputs[args.rows[-2]], args.rows[-2], "eager after graphs")
    start_up(pool, inputs[args.rows[0]])
    pool.close()


def gaps(pool, x, rows, what):
    """Where the link idled in two iterations, and how much of the computing had to wait."""
    forward(x, pool)
    torch.cuda.synchronize()
    pool.start_trace()
    forward(x, pool)
    forward(x, pool)
    torch.cuda.synchronize()
    events = pool.trace()
    fetches = sorted((begin, end, layer) for kind, layer, _, begin, end in events if kind == "fetch")
    idle = [(b[0] - a[1]) * 1e3 for a, b in itertools.pairwise(fetches)]
    report(what=f"trace, {what}", rows=rows, fetches=len(fetches), fetch_ms=[round((e - b) * 1e3, 2) for b, e, _ in fetches],
           idle_ms=[round(ms, 2) for ms in idle],
           compute_ms=[round((e - b) * 1e3, 2) for k, _, _, b, e in events if k == "compute"],
           stall_ms=[round((e - b) * 1e3, 2) for k, _, _, b, e in events if k == "stall"])  # fmt: skip


def start_up(pool, x):
    """How long the first layer is waited for when the ring holds something else, and how long the next ones."""
    middle = pool.num_layers // 2
    ffn_forward(x, pool, middle)
    torch.cuda.synchronize()
    pool.start_trace()
    forward(x, pool)
    torch.cuda.synchronize()
    report(what="start-up", stall_ms=[round((e - b) * 1e3, 2) for k, _, _, b, e in pool.trace() if k == "stall"])


def slices(bench):
    """Copies cut into slices, against whole ones."""
    layers, rows = 6, 8192
    x = torch.randn(rows, bench.args.hidden, device="cuda", dtype=torch.bfloat16)
    for slice_mb in ("0", "4", "16", "32", "64"):
        pool = bench.pool(layers, slice_mb=slice_mb)
        bare = timed(lambda: bench.copy_bare(layers), bench.args.repeats)
        alone = bench.ring_alone(pool, bare)
        pooled = timed(lambda pool=pool: forward(x, pool), bench.args.repeats)
        report(what="slices", slice_mb=slice_mb, rows=rows, link=bare, pooled=pooled, ring=alone)
        pool.close()


def host(bench):
    """Host time of acquire + release of a ready layer, small units so that no queue fills up; opening of a pool."""
    for kind in ("events", "words"):
        os.environ["SIDP_HAND_OVER"] = kind
        spec = FFNSpec(64, 64)
        unit = {t.name: torch.zeros(t.shape, dtype=t.dtype) for t in spec.unit().tensors}
        pool = WeightPool([spec] * 32, config=PoolConfig(mode="was", host_tier=True, slots=4))
        for layer in range(32):
            pool.load(layer, unit)
        pool.commit()
        times = []
        for _ in range(50):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            empty(pool)
            times.append((time.perf_counter() - begin) / 32 * 1e6)
        report(what="host cost of a layer", hand_over=kind, us=statistics.median(times))
        pool.close()


PARTS = {"overlap": overlap, "slices": slices, "host": host}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--inner", type=int, default=25600)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024, 4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if len(args.rows) < 2:
        parser.error("--rows needs two numbers at least")
    report(what="device", name=torch.cuda.get_device_name(0), torch=torch.__version__, cuda=torch.version.cuda)
    bench = Bench(args)
    for part in args.parts:
        PARTS[part](bench)


if __name__ == "__main__":
    main()

"""Overlap of the host tier on one GPU: Qwen3-32B-shaped layers, against compute alone and the bare pinned copy.

Prints JSON lines. Times are medians by CUDA events over whole iterations, in ms; `ratio` = pooled / max(compute, link).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch

from sidp import FFNSpec, PoolConfig, WeightPool, ffn_forward
from sidp.ffn import apply_formula


def timed(run, repeats=5):
    times = []
    for i in range(repeats + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        if i:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--inner", type=int, default=25600)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024, 4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    spec = FFNSpec(args.hidden, args.inner)
    unit = {
        t.name: (torch.randn(t.shape, device="cuda") * t.shape[-1] ** -0.5).to(t.dtype) for t in spec.unit().tensors
    }
    nbytes = spec.unit().nbytes

    def report(**fields):
        print(json.dumps(fields), flush=True)

    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    bare = timed(lambda: [target.copy_(host, non_blocking=True) for _ in range(args.layers)], args.repeats)
    report(what="bare pinned copy", ms=bare, gb_s=args.layers * nbytes / bare / 1e6)

    def make(**environment):
        os.environ.update(environment)
        pool = WeightPool([spec] * args.layers, config=PoolConfig(mode="was", host_tier=True, slots=3))
        for layer in range(args.layers):
            pool.load(layer, unit)
        pool.commit()
        return pool

    def forward(x, pool):
        for layer in range(args.layers):
            ffn_forward(x, pool, layer)

    alone = {}
    for rows in args.rows:
        x = torch.randn(rows, args.hidden, device="cuda", dtype=torch.bfloat16)
        alone[rows] = timed(lambda x=x: [apply_formula(x, unit, spec) for _ in range(args.layers)], args.repeats)
    begin = time.monotonic()
    pool = make(SIDP_HAND_OVER="events", SIDP_SLICE_MB="0")
    report(what="load and commit", seconds=time.monotonic() - begin)

    def empty():
        for layer in range(args.layers):
            pool.acquire(layer)
            pool.release(layer)

    fetched = pool.stats().fetched_bytes
    link = timed(empty, args.repeats)
    if pool.stats().fetched_bytes - fetched < args.repeats * args.layers * nbytes:
        raise SystemExit("the ring did not fetch every layer of every iteration: timings would mean nothing")
    report(what="ring without compute", ms=link, gb_s=args.layers * nbytes / link / 1e6, of_bare=bare / link)
    for rows in args.rows:
        x = torch.randn(rows, args.hidden, device="cuda", dtype=torch.bfloat16)
        for layer in (0, args.layers - 1):
            if not torch.equal(ffn_forward(x, pool, layer), apply_formula(x, unit, spec)):
                raise SystemExit(f"layer {layer} is not bit-identical to the unpooled one: timings would mean nothing")
        pooled = timed(lambda x=x: forward(x, pool), args.repeats)
        floor = max(alone[rows], bare)
        report(what="eager", rows=rows, compute=alone[rows], link=bare, pooled=pooled, ratio=pooled / floor)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward(x, pool)
        pooled = timed(graph.replay, args.repeats)
        report(what="graph", rows=rows, compute=alone[rows], link=bare, pooled=pooled, ratio=pooled / floor)
        torch.cuda.synchronize()
        del graph
    pool.close()
    host_cost(report)


def host_cost(report):
    """Host time of acquire + release of a ready layer, small units so that no queue fills up."""
    for kind in ("events", "words"):
        os.environ["SIDP_HAND_OVER"] = kind
        spec = FFNSpec(64, 64)
        unit = {t.name: torch.zeros(t.shape, dtype=t.dtype) for t in spec.unit().tensors}
        pool = WeightPool([spec] * 32, config=PoolConfig(mode="was", host_tier=True, slots=4))
        for layer in range(32):
            pool.load(layer, unit)
        pool.commit()
        samples = []
        for _ in range(20):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for layer in range(32):
                pool.acquire(layer)
                pool.release(layer)
            samples.append((time.perf_counter() - begin) / 32 * 1e6)
        report(what="host cost of a layer", hand_over=kind, us=statistics.median(samples))
        pool.close()


if __name__ == "__main__":
    main()

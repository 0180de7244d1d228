"""Compares builds of the CUDA CaS server: each is checked against float64, then all are timed in turn on the same weights.

    python bench/cas_compare.py NAME=LIBRARY... [--shapes ...] [--rows ...] [--sms ...] [--dtype bfloat16] [--out FILE]
    python bench/cas_compare.py NAME=LIBRARY --trace --sms 32 --rows 1     # a build with -DSIDP_CAS_TRACE
    ncu ... python bench/cas_compare.py NAME=LIBRARY --staged --sms 32 --rows 1

LIBRARY is bench/cas_capi.cu linked with csrc/cas_server. Microseconds, medians over graph replays, the better of two turns.
`--staged` serves one request with no two kernels at once, as a profiler needs it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time

import torch
from cas_group import SHAPES, Group, Weights, graph_us, load, relative
from cas_kernel import check_small

MARKS = [
    "received",
    "issued",
    "first_stage",
    "gate_up",
    "inner_written",
    "inner_seen",
    "down_stage",
    "down",
    "results",
    "finished",
    "replied",
]
TRACED_CTAS, MARK_COUNT = 256, len(MARKS) + 2


def make_units(name: str, dtype: torch.dtype) -> list[Weights]:
    hidden, inner = SHAPES[name]
    return [Weights.random(hidden, inner, "silu", True, False, dtype) for _ in range(2)]


def rows_of(units: list[Weights], rows: int) -> torch.Tensor:
    down = units[0].tensors["down"]
    return torch.randn(rows, down.shape[0], device="cuda", dtype=down.dtype)


def time_build(lib, units, sms: int, inputs: dict[int, tuple]) -> dict[int, tuple]:
    """(call us, serve us, error) for each number of rows; `inputs` has the rows and the float64 result of unit 1."""
    group = Group(lib, units, sms=sms)
    results = {}
    try:
        for rows, (x, reference) in inputs.items():
            y = torch.empty_like(x)

            def call(i):
                group.push(0, i % 2, x)  # noqa: B023
                group.wait(0, y)  # noqa: B023

            error = relative(group.call(x, layer=1), reference)
            took = graph_us(call)
            group.check()
            serve = statistics.median(group.reply(0, sequence)[4] for sequence in (1, 2, 3, 4))
            results[rows] = (took, serve, error)
    finally:
        group.close()
    return results


def compare(builds: dict, name: str, dtype: torch.dtype, rows_list: list[int], sms_list: list[int]) -> list[dict]:
    units = make_units(name, dtype)
    inputs, cublas, own_error = {}, {}, {}
    for rows in rows_list:
        x = rows_of(units, rows)
        inputs[rows] = (x, units[1](x.double()))
        own_error[rows] = relative(units[1](x), inputs[rows][1])
        cublas[rows] = graph_us(lambda i: units[i % 2](x))  # noqa: B023
    results = []
    for sms in sms_list:
        turns = [{build: time_build(lib, units, sms, inputs) for build, lib in builds.items()} for _ in range(2)]
        for rows in rows_list:
            line = f"{name} {str(dtype)[6:]} {sms} SMs M={rows}: cuBLAS {cublas[rows]:.1f};"
            for build in builds:
                calls = [turn[build][rows][0] for turn in turns]
                serve = min(turn[build][rows][1] for turn in turns)
                error = max(turn[build][rows][2] for turn in turns)
                results.append(dict(shape=name, dtype=str(dtype), sms=sms, rows=rows, build=build, call_us=calls,
                                    serve_us=serve, cublas_us=cublas[rows], error=error,
                                    cublas_error=own_error[rows]))  # fmt: skip
                bad = "" if error <= 1.05 * own_error[rows] else f" WRONG {error:.4f} > {own_error[rows]:.4f}"
                line += f" {build} {min(calls):.1f}/{serve:.1f}/{min(calls) / cublas[rows]:.3f}{bad}"
            print(line, flush=True)
    return results


def trace(lib, units, sms: int, rows: int) -> dict:
    """When the CTAs pass each mark of a batch, in us after the first CTA has the batch: (first, median, last)."""
    group = Group(lib, units, sms=sms)
    x = rows_of(units, rows)
    y = torch.empty_like(x)

    def call(i):
        group.push(0, i % 2, x)
        group.wait(0, y)

    def read():
        raw = (ctypes.c_uint64 * (TRACED_CTAS * MARK_COUNT))()
        if lib.sidp_cas_trace(raw) != 0:
            raise RuntimeError("the trace could not be read")
        return [raw[cta * MARK_COUNT : (cta + 1) * MARK_COUNT] for cta in range(sms)]

    try:
        graph_us(call)
        before = read()
        took = graph_us(call)
        group.check()
        marks = read()
    except RuntimeError as error:
        raise RuntimeError(f"{error}; {group.fault()}") from error
    finally:
        group.close()
    ends = torch.tensor([[float(cta[3] - cta[0]) for cta in turn] for turn in (before, marks)])  # gate_up
    alike = torch.corrcoef(ends)[0, 1].item()
    start = min(mark[0] for mark in marks)
    result = {}
    for i, mark_name in enumerate(MARKS):
        times = [(mark[i] - start) / 1e3 for mark in marks if mark[i] >= start]
        if times:
            result[mark_name] = (min(times), statistics.median(times), max(times))
    cycles = marks[0][MARK_COUNT - 1] - marks[0][MARK_COUNT - 2]
    clock = cycles / (marks[0][MARKS.index("finished")] - marks[0][0])
    print(f"trace {sms} SMs M={rows}: call {took:.1f} us, {clock:.3f} GHz, same CTAs late in two batches {alike:.2f}; first/median/last us: "
          + ", ".join(f"{k} {a:.1f}/{b:.1f}/{c:.1f}" for k, (a, b, c) in result.items()), flush=True)  # fmt: skip
    return dict(sms=sms, rows=rows, call_us=took, ghz=clock, alike=alike, marks=result)


def staged(lib, units, sms: int, rows: int) -> None:
    group = Group(lib, units, sms=sms, start=False, idle_ms=0.02)
    x = rows_of(units, rows)
    y = torch.full_like(x, float("nan"))
    torch.cuda.synchronize()
    group.push(0, 1, x)
    torch.cuda.synchronize()
    group.start()
    deadline = time.monotonic() + 60
    while group.reply(0, 1)[1] == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    group.wait(0, y)
    torch.cuda.synchronize()
    group.check()
    print("staged: relative error", relative(y, units[1](x.double())), flush=True)
    group.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("builds", nargs="+", help="name=library")
    parser.add_argument("--shapes", default="Qwen3-32B")
    parser.add_argument("--rows", default="1,16,32,64,128")
    parser.add_argument("--sms", default="32,40,48")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--skip-small", action="store_true")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--staged", action="store_true")
    parser.add_argument("--out")
    options = parser.parse_args()
    builds = {name: load(path) for name, path in (build.split("=", 1) for build in options.builds)}
    rows, sms = ([int(v) for v in text.split(",")] for text in (options.rows, options.sms))
    dtype = getattr(torch, options.dtype)
    results: dict = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    if options.staged or options.trace:
        units = make_units(options.shapes, dtype)
        for lib in builds.values():
            for s in sms:
                for r in rows:
                    if options.staged:
                        staged(lib, units, s, r)
                    else:
                        results.setdefault("traces", []).append(trace(lib, units, s, r))
    else:
        if not options.skip_small:
            for name, lib in list(builds.items()):
                wrong = [case for case in check_small(lib, plain=False) if not case["ok"]]
                if wrong:
                    print(f"build {name} is WRONG and not timed: {wrong}", flush=True)
                    del builds[name]
        for shape in options.shapes.split(","):
            results.setdefault("times", []).extend(compare(builds, shape, dtype, rows, sms))
    if options.out:
        with open(options.out, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()

"""Checks and times the CUDA CaS server against torch (cuBLAS on all SMs) and the bare HBM read, in one process.

    python bench/cas_kernel.py LIBRARY [--out results.json]

LIBRARY is bench/cas_capi.cu linked with csrc/cas_server. Weights are drawn fresh; errors are relative Frobenius norms
against float64, cuBLAS' own beside ours. Times are medians over graph replays, in microseconds; "call" is what the
stream sees of push, serve and wait, "serve" the server's own time from the election of the batch to the reply.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics

import torch
from cas_group import SHAPES, Group, Weights, graph_us, load, relative
from cas_owner import owner_cost


def check_small(lib, plain: bool) -> list[dict]:
    """Every activation, format and bias on small odd shapes; all row counts' widths; fused rows of two requesters."""
    results = []
    cases = [
        # hidden, inner, activation, gated, bias, dtype
        (256, 512, "silu", True, False, torch.bfloat16),
        (1024, 2816, "silu", True, True, torch.float16),
        (776, 1000, "gelu", False, True, torch.bfloat16),
        (512, 2048, "gelu_tanh", True, True, torch.bfloat16),
        (640, 1304, "relu2", False, False, torch.float16),
        (1280, 5120, "relu", False, True, torch.bfloat16),
    ]
    for hidden, inner, activation, gated, bias, dtype in cases:
        unit = Weights.random(hidden, inner, activation, gated, bias, dtype)
        group = Group(lib, [unit], world=2, sms=16, plain=plain)
        errors = []  # (rows, ours, cuBLAS)
        try:
            for rows in (1, 3, 8, 9, 16, 31, 64, 65, 128):
                x = [torch.randn(rows, hidden, device="cuda", dtype=dtype) for _ in range(2)]
                y = [torch.full_like(v, float("nan")) for v in x]
                for rank in (0, 1):  # two requesters at once: fused when they fit
                    group.push(rank, 0, x[rank])
                for rank in (0, 1):
                    group.wait(rank, y[rank])
                torch.cuda.synchronize()
                group.check()
                for rank in (0, 1):
                    reference = unit(x[rank].double())
                    errors.append((rows, relative(y[rank], reference), relative(unit(x[rank]), reference)))
            ok = all(ours <= 1.05 * own for _, ours, own in errors)
            case = f"{hidden}x{inner} {activation} gated={gated} bias={bias} {dtype} plain={plain}"
            worst = max(errors, key=lambda e: e[1] / e[2])
            results.append(dict(case=case, ok=ok, worst=worst, counters=group.counters(), errors=[] if ok else errors))
        finally:
            group.close()
        print(results[-1], flush=True)
    return results


def measure_shape(lib, name: str, rows_list, sms_list, quick: bool) -> list[dict]:
    hidden, inner = SHAPES[name]
    units = [Weights.random(hidden, inner, "silu", True, False, torch.bfloat16) for _ in range(2)]
    size = units[0].bytes()
    stream = lambda: ctypes.c_uint64(torch.cuda.current_stream().cuda_stream)  # noqa: E731
    floors = {}
    for sms in sms_list:

        def bulk(i, sms=sms):
            for t in units[i % 2].tensors.values():
                lib.sidp_cas_read_bulk(ctypes.c_uint64(t.data_ptr()), ctypes.c_uint64(t.numel() * 2), sms, stream())

        def boxes(i, sms=sms):
            for t in units[i % 2].tensors.values():
                lib.sidp_cas_read_boxes(ctypes.c_uint64(t.data_ptr()), t.shape[0], t.shape[1], sms, stream())

        floors[sms] = (graph_us(bulk), graph_us(boxes))
        print(f"{name} bare read {sms} SMs: bulk {floors[sms][0]:.1f} us {size / floors[sms][0] / 1e3:.0f} GB/s, "
              f"boxes {floors[sms][1]:.1f} us {size / floors[sms][1] / 1e3:.0f} GB/s", flush=True)  # fmt: skip
    cublas = {}
    for rows in rows_list:
        x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
        cublas[rows] = graph_us(lambda i: units[i % 2](x))  # noqa: B023
    results = []
    for sms in sms_list:
        group = Group(lib, units, sms=sms)
        try:
            for rows in rows_list:
                x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
                y = torch.empty_like(x)

                def call(i):
                    group.push(0, i % 2, x)  # noqa: B023
                    group.wait(0, y)  # noqa: B023

                errors = ()
                if sms == sms_list[0]:
                    ours = group.call(x, layer=1)
                    torch.cuda.synchronize()
                    group.check()
                    reference = units[1](x.double())
                    errors = (relative(ours, reference), relative(units[1](x), reference))
                    del reference
                before = group.counters()
                time = graph_us(call)
                group.check()
                serve = [group.reply(0, s)[4] for s in (1, 2, 3, 4)]
                results.append(dict(shape=name, rows=rows, sms=sms, call_us=time, serve_us=statistics.median(serve),
                                    cublas_us=cublas[rows], ratio=time / cublas[rows], bulk_us=floors[sms][0],
                                    boxes_us=floors[sms][1], gbs=size / time / 1e3, errors=errors,
                                    before=before))  # fmt: skip
                r = results[-1]
                print(f"{name} M={rows} {sms} SMs: call {time:.1f} serve {r['serve_us']:.1f} cuBLAS {cublas[rows]:.1f} "
                      f"ratio {r['ratio']:.3f} | {r['gbs']:.0f} GB/s, of bare read {floors[sms][0] / time:.3f} | "
                      f"errors {errors}", flush=True)  # fmt: skip
        finally:
            group.close()
    return results


def measure_fusion(lib, name: str, sms: int) -> dict:
    """Four ranks' 8 rows fused against one rank's 8: the server is kept busy with another unit while they queue."""
    hidden, inner = SHAPES[name]
    units = [Weights.random(hidden, inner, "silu", True, False, torch.bfloat16) for _ in range(2)]
    group = Group(lib, units, world=5, sms=sms)
    alone, fused, requests = [], [], []
    try:
        x = [torch.randn(8, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(5)]
        y = [torch.full_like(v, float("nan")) for v in x]
        torch.cuda.synchronize()
        for n in range(1, 8):
            group.push(4, 0, x[4])
            for rank in range(4):
                group.push(rank, 1, x[rank])
            for rank in range(5):
                group.wait(rank, y[rank])
            torch.cuda.synchronize()
            group.check()
            alone.append(group.reply(4, n)[4])
            requests.append(group.reply(0, n)[3])
            if requests[-1] == 4:
                fused.append(group.reply(0, n)[4])
        error = max(relative(y[r], units[1](x[r].double())) for r in range(4))
    finally:
        group.close()
    result = dict(alone_us=statistics.median(alone), fused_us=statistics.median(fused) if fused else None,
                  requests=requests, error=error)  # fmt: skip
    print("fusion 4x8 against 8:", result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--out")
    parser.add_argument("--shapes", default=",".join(name for name in SHAPES if name != "tiny"))
    parser.add_argument("--rows", default="1,4,16,32,64,128")
    parser.add_argument("--sms", default="24,32,48")
    parser.add_argument("--skip-small", action="store_true")
    parser.add_argument("--skip-fusion", action="store_true")
    parser.add_argument("--owner-cost", action="store_true", help="what the server costs its owner, and nothing else")
    options = parser.parse_args()
    lib = load(options.library)
    torch.manual_seed(torch.seed())
    results: dict = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    if options.owner_cost:
        options.skip_small = options.skip_fusion = True
        options.shapes = ""
        results["owner"] = [owner_cost(lib, int(sms)) for sms in options.sms.split(",")]
    if not options.skip_small:
        results["small"] = check_small(lib, plain=False) + check_small(lib, plain=True)
    rows = [int(v) for v in options.rows.split(",")]
    sms = [int(v) for v in options.sms.split(",")]
    for name in filter(None, options.shapes.split(",")):
        results.setdefault("times", []).extend(measure_shape(lib, name, rows, sms, False))
        torch.cuda.empty_cache()
    if not options.skip_fusion:
        results["fusion"] = measure_fusion(lib, "Qwen3-32B", 32)
    if options.out:
        with open(options.out, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()

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
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SHAPES = {"Qwen3-32B": (5120, 25600), "Llama-3.1-70B": (8192, 28672), "Qwen2.5-72B": (8192, 29568)}
ACTIVATIONS = {
    "silu": (0, F.silu),
    "gelu": (1, F.gelu),
    "gelu_tanh": (2, lambda x: F.gelu(x, approximate="tanh")),
    "relu": (3, F.relu),
    "relu2": (4, lambda x: F.relu(x).square()),
}


class Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint32)
        for name in (
            "world",
            "slots",
            "max_rows",
            "hidden",
            "intermediate",
            "layers",
            "sms",
            "rank",
            "dtype",
            "reply_float32",
            "plain",
        )
    ] + [(name, ctypes.c_double) for name in ("idle_ms", "run_ms", "watch_ms", "stall_s")]


def load(path: str) -> ctypes.CDLL:
    lib = ctypes.CDLL(path)
    lib.sidp_cas_error.restype = ctypes.c_char_p
    for name in ("sidp_cas_region_bytes", "sidp_cas_reply_offset"):
        getattr(lib, name).restype = ctypes.c_uint64
    for name in ("sidp_cas_server", "sidp_cas_requester"):
        getattr(lib, name).restype = ctypes.c_void_p
    return lib


@dataclass
class Weights:
    tensors: dict[str, torch.Tensor]
    activation: str

    @staticmethod
    def random(hidden: int, inner: int, activation: str, gated: bool, bias: bool, dtype: torch.dtype) -> Weights:
        def draw(*shape: int, scale: float) -> torch.Tensor:
            return torch.empty(shape, device="cuda", dtype=dtype).normal_(0, scale)

        t = {"up": draw(inner, hidden, scale=hidden**-0.5), "down": draw(hidden, inner, scale=inner**-0.5)}
        if gated:
            t["gate"] = draw(inner, hidden, scale=hidden**-0.5)
        if bias:
            t |= {"up_bias": draw(inner, scale=0.5), "down_bias": draw(hidden, scale=0.5)}
            if gated:
                t["gate_bias"] = draw(inner, scale=0.5)
        return Weights(t, activation)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The FFN in x's dtype: float64 is the reference, the weights' own dtype is cuBLAS."""
        t = {k: v.to(x.dtype) for k, v in self.tensors.items()} if x.dtype == torch.float64 else self.tensors
        act = ACTIVATIONS[self.activation][1]
        up = F.linear(x, t["up"], t.get("up_bias"))
        h = act(F.linear(x, t["gate"], t.get("gate_bias"))) * up if "gate" in t else act(up)
        return F.linear(h, t["down"], t.get("down_bias"))

    def bytes(self) -> int:
        return sum(v.numel() * v.element_size() for v in self.tensors.values())


class Group:
    """`world` requesters of one process; one server per owner in `owners`."""

    def __init__(self, lib, units, world=1, owners=1, slots=4, max_rows=128, sms=32, striped=False, plain=False,
                 idle_ms=2.0, run_ms=50.0, watch_ms=5.0, stall_s=3.0):  # fmt: skip
        self.lib, self.units, self.striped = lib, units, striped
        down = units[0].tensors["down"]
        self.hidden, inner, self.dtype = down.shape[0], down.shape[1] // (owners if striped else 1), down.dtype
        code = {torch.bfloat16: 0, torch.float16: 1}[self.dtype]
        self.shape = Shape(world, slots, max_rows, self.hidden, inner, len(units), sms, 0, code, striped, plain,
                           idle_ms, run_ms, watch_ms, stall_s)  # fmt: skip
        self.shape_args = (world, slots, max_rows, self.hidden, 4 if striped else 2)
        size = lib.sidp_cas_region_bytes(*self.shape_args)
        self.regions = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(world)]
        pointers = (ctypes.c_uint64 * world)(*[r.data_ptr() for r in self.regions])
        torch.cuda.synchronize()
        self.requesters, self.servers, self.slices = [], [], []
        for rank in range(world):
            self.shape.rank = rank
            region = ctypes.c_uint64(self.regions[rank].data_ptr())
            self.requesters.append(self.made(lib.sidp_cas_requester(ctypes.byref(self.shape), region, pointers,
                                                                   ctypes.c_double(5.0))))  # fmt: skip
            if rank < owners:
                server = self.made(lib.sidp_cas_server(ctypes.byref(self.shape), region, pointers))
                self.servers.append(server)
                for layer, unit in enumerate(units):
                    self.register(server, layer, unit, rank, owners)
        for server in self.servers:
            self.ok(lib.sidp_cas_start(ctypes.c_void_p(server)))

    def register(self, server, layer, unit, rank, owners):
        t = unit.tensors
        if self.striped:
            inner = t["up"].shape[0] // owners
            part = slice(rank * inner, (rank + 1) * inner)
            cut = {"down_bias": lambda v: v, "down": lambda v: v[:, part]}
            t = {k: cut.get(k, lambda v: v[part])(v).contiguous() for k, v in t.items()}
            if rank:
                t.pop("down_bias", None)
            self.slices.append(t)
        names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        pointers = (ctypes.c_uint64 * 6)(*[t[n].data_ptr() if n in t else 0 for n in names])
        self.ok(self.lib.sidp_cas_register(ctypes.c_void_p(server), layer, pointers, self.hidden, t["up"].shape[0],
                                           ACTIVATIONS[unit.activation][0]))  # fmt: skip

    def made(self, handle):
        if not handle:
            raise RuntimeError(self.lib.sidp_cas_error().decode())
        return handle

    def ok(self, code):
        if code != 0:
            raise RuntimeError(self.lib.sidp_cas_error().decode())

    def push(self, rank, layer, x, owner=0):
        stream = ctypes.c_uint64(torch.cuda.current_stream().cuda_stream)
        self.ok(self.lib.sidp_cas_push(ctypes.c_void_p(self.requesters[rank]), -1 if self.striped else owner, layer,
                                       ctypes.c_uint64(x.data_ptr()), x.shape[0], ctypes.c_uint64(x.stride(0) * 2),
                                       stream))  # fmt: skip

    def wait(self, rank, y, owner=0):
        stream = ctypes.c_uint64(torch.cuda.current_stream().cuda_stream)
        self.ok(self.lib.sidp_cas_wait(ctypes.c_void_p(self.requesters[rank]), -1 if self.striped else owner,
                                       ctypes.c_uint64(y.data_ptr()), y.shape[0], ctypes.c_uint64(y.stride(0) * 2),
                                       stream))  # fmt: skip

    def call(self, x, layer=0, rank=0):
        y = torch.full_like(x, float("nan"))
        self.push(rank, layer, x)
        self.wait(rank, y)
        return y

    def check(self):
        for requester in self.requesters:
            self.ok(self.lib.sidp_cas_check(ctypes.c_void_p(requester)))

    def reply(self, rank, sequence, owner=0):
        """(status, rows, batch_rows, batch_requests, service_us) of the reply record of that request."""
        at = self.lib.sidp_cas_reply_offset(*self.shape_args, owner, ctypes.c_uint64(sequence))
        words = self.regions[rank][at : at + 32].cpu().view(torch.int32).tolist()
        return (*words[2:6], words[6] / 1e3)

    def counters(self, owner=0):
        out = (ctypes.c_uint64 * 6)()
        self.ok(self.lib.sidp_cas_counters(ctypes.c_void_p(self.servers[owner]), out))
        return dict(zip(("batches", "requests", "rows", "refused", "busy_ns", "launches"), out, strict=True))

    def close(self):
        for server in self.servers:
            self.ok(self.lib.sidp_cas_stop(ctypes.c_void_p(server)))
        torch.cuda.synchronize()
        for server in self.servers:
            self.lib.sidp_cas_server_free(ctypes.c_void_p(server))
        for requester in self.requesters:
            self.lib.sidp_cas_requester_free(ctypes.c_void_p(requester))


def relative(y: torch.Tensor, reference: torch.Tensor) -> float:
    return ((y.double() - reference).norm() / reference.norm()).item()


def graph_us(function, repeats=10, rounds=7) -> float:
    """Median time of one call in microseconds, from replays of a graph of `repeats` calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):
            function(i)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
            for i in range(repeats):
                function(i)
        times = []
        for _ in range(rounds + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / repeats)
    return statistics.median(times[1:])


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
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rows", default="1,4,16,32,64,128")
    parser.add_argument("--sms", default="24,32,48")
    parser.add_argument("--skip-small", action="store_true")
    parser.add_argument("--skip-fusion", action="store_true")
    options = parser.parse_args()
    lib = load(options.library)
    torch.manual_seed(torch.seed())
    results: dict = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
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

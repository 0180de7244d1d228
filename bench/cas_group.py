"""The CUDA CaS server and requester through bench/cas_capi.cu, for the benches of this folder: random weights with their
float64 reference, a group of requesters and servers in one process, and the timing of graph replays."""

from __future__ import annotations

import ctypes
import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# `tiny` is for what a request costs beyond its FFN.
SHAPES = {"tiny": (5120, 512), "Qwen3-32B": (5120, 25600), "Llama-3.1-70B": (8192, 28672), "Qwen2.5-72B": (8192, 29568)}
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
    ] + [(name, ctypes.c_double) for name in ("idle_ms", "run_ms", "stall_s")]


def load(path: str) -> ctypes.CDLL:
    lib = ctypes.CDLL(path)
    lib.sidp_cas_error.restype = ctypes.c_char_p
    for name in ("sidp_cas_region_bytes", "sidp_cas_reply_offset", "sidp_cas_bells"):
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
                 idle_ms=2.0, run_ms=50.0, stall_s=3.0, start=True):  # fmt: skip
        self.lib, self.units, self.striped = lib, units, striped
        down = units[0].tensors["down"]
        self.hidden, inner, self.dtype = down.shape[0], down.shape[1] // (owners if striped else 1), down.dtype
        code = {torch.bfloat16: 0, torch.float16: 1}[self.dtype]
        self.shape = Shape(world, slots, max_rows, self.hidden, inner, len(units), sms, 0, code, striped, plain,
                           idle_ms, run_ms, stall_s)  # fmt: skip
        self.shape_args = (world, slots, max_rows, self.hidden, 4 if striped else 2)
        size = lib.sidp_cas_region_bytes(*self.shape_args)
        self.regions = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(world)]
        pointers = (ctypes.c_uint64 * world)(*[r.data_ptr() for r in self.regions])
        self.bells = (ctypes.c_uint64 * world)(*[self.made(lib.sidp_cas_bells()) for _ in range(world)])
        torch.cuda.synchronize()
        self.requesters, self.servers, self.slices = [], [], []
        for rank in range(world):
            self.shape.rank = rank
            region = ctypes.c_uint64(self.regions[rank].data_ptr())
            self.requesters.append(self.made(lib.sidp_cas_requester(ctypes.byref(self.shape), region, pointers, self.bells,
                                                                   ctypes.c_double(5.0))))  # fmt: skip
            if rank < owners:
                server = self.made(lib.sidp_cas_server(ctypes.byref(self.shape), region, pointers,
                                                       ctypes.c_uint64(self.bells[rank]),
                                                       ctypes.c_void_p(self.requesters[rank])))  # fmt: skip
                self.servers.append(server)
                for layer, unit in enumerate(units):
                    self.register(server, layer, unit, rank, owners)
        if start:
            self.start()

    def start(self):
        for server in self.servers:
            self.ok(self.lib.sidp_cas_start(ctypes.c_void_p(server)))

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

    def fault(self) -> str:
        """What the servers say of a failed launch; their words lie in the host's memory."""
        bad = [s for s in self.servers if self.lib.sidp_cas_fault(ctypes.c_void_p(s)) != 0]
        return self.lib.sidp_cas_error().decode() if bad else "no server has failed"

    def close(self):
        for server in self.servers:
            self.ok(self.lib.sidp_cas_stop(ctypes.c_void_p(server)))
        torch.cuda.synchronize()
        for server in self.servers:
            self.lib.sidp_cas_server_free(ctypes.c_void_p(server))
        for requester in self.requesters:
            self.lib.sidp_cas_requester_free(ctypes.c_void_p(requester))
        for page in self.bells:
            self.lib.sidp_cas_bells_free(ctypes.c_uint64(page))


def relative(y: torch.Tensor, reference: torch.Tensor) -> float:
    return ((y.double() - reference).norm() / reference.norm()).item()


def captured(function, repeats=10) -> tuple:
    """A graph of `repeats` calls and its stream. Capturing waits for all of the device."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):
            function(i)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
            for i in range(repeats):
                function(i)
    return graph, stream


def replay_us(graph, stream, repeats=10, rounds=7) -> float:
    """Median time of one of the `repeats` calls of `graph` in microseconds."""
    with torch.cuda.stream(stream):
        times = []
        for _ in range(rounds + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / repeats)
    return statistics.median(times[1:])


def graph_us(function, repeats=10, rounds=7) -> float:
    return replay_us(*captured(function, repeats), repeats, rounds)

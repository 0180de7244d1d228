"""What the CaS server costs the rank that holds it: an engine's work on the same GPU without a server, with an idle one, with
one that holds its SMs and polls, and with one that is kept busy. Called by bench/cas_kernel.py --owner-cost."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cas_group import SHAPES, Group, Weights, captured, replay_us

SEQUENCES, CONTEXT, HEADS, KV_HEADS, HEAD = 64, 2048, 64, 8, 128


class Decode:
    """Layers of Qwen3-32B's shapes for 64 sequences of 2048 tokens: projections, attention over the KV cache, FFN."""

    def __init__(self, units: list[Weights]):
        hidden = SHAPES["Qwen3-32B"][0]

        def draw(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5)

        self.units = units
        self.x = draw(SEQUENCES, hidden)
        self.query = draw(HEADS * HEAD, hidden)
        self.key_value = draw(2 * KV_HEADS * HEAD, hidden)
        self.output = draw(hidden, HEADS * HEAD)
        self.keys, self.values = (draw(SEQUENCES, KV_HEADS, CONTEXT, HEAD) for _ in range(2))

    def layer(self, i: int) -> torch.Tensor:
        query = F.linear(self.x, self.query).view(SEQUENCES, HEADS, 1, HEAD)
        F.linear(self.x, self.key_value)
        # The queries of a key's group stand where a sequence's positions would: the cache is read once.
        grouped = query.view(SEQUENCES, KV_HEADS, HEADS // KV_HEADS, HEAD)
        mixed = F.scaled_dot_product_attention(grouped, self.keys, self.values).reshape(SEQUENCES, HEADS * HEAD)
        return self.units[i % len(self.units)](self.x + F.linear(mixed, self.output))


def measure(work: dict) -> dict[str, float]:
    return {name: replay_us(*graph, rounds=5) for name, graph in work.items()}


def beside_busy(group: Group, x: torch.Tensor, work: dict) -> dict[str, float]:
    """`work` while another stream calls the server without a pause."""
    y = torch.empty_like(x)

    def call(i):
        group.push(0, i % 2, x)
        group.wait(0, y)

    calls, stream = captured(call, repeats=20)
    results = {}
    for name, graph in work.items():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            start.record()
            for _ in range(60):
                calls.replay()
            end.record()
        took = replay_us(*graph, rounds=5)
        if end.query():
            raise RuntimeError("the server's requests ended before the work beside them did")
        end.synchronize()
        results[name] = took
        results[name + ", a call beside it"] = start.elapsed_time(end) * 1e3 / 1200
    group.check()
    return results


def owner_cost(lib, sms: int) -> dict:
    hidden, inner = SHAPES["Qwen3-32B"]
    units = [Weights.random(hidden, inner, "silu", True, False, torch.bfloat16) for _ in range(2)]
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    decode = Decode(units)
    work = {"GEMM 8192^3": captured(lambda _: a @ b), "decode layer": captured(decode.layer)}
    x = torch.randn(8, hidden, device="cuda", dtype=torch.bfloat16)
    states: dict = {"none": measure(work)}

    group = Group(lib, units, sms=sms, idle_ms=1.0, run_ms=20.0)
    try:
        torch.cuda.synchronize()
        states["idle"] = measure(work)
        states["busy"] = beside_busy(group, x, work)
    finally:
        group.close()
    group = Group(
        lib, units, sms=sms, idle_ms=1e5, run_ms=1e5
    )  # after a request it holds its SMs until it is told to stop
    try:
        group.call(x)
        torch.cuda.synchronize()
        states["polling"] = measure(work)
    finally:
        group.close()
    states["none again"] = measure(work)
    for state, times in states.items():
        print(f"owner, {sms} SMs, server {state}: " + ", ".join(
            f"{name} {us:.1f} us" + (f" ({us / states['none'][name]:.3f})" if name in states["none"] else "")
            for name, us in times.items()), flush=True)  # fmt: skip
    return states

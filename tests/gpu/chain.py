"""A chain of FFNs on the GPU, through a pool and without one: what the tests of WaS on GPUs compare."""

from __future__ import annotations

import torch

from sidp import FFNSpec, PoolConfig, WeightPool, ffn_forward
from sidp.ffn import apply_formula

LAYERS, HIDDEN, INNER = 7, 256, 704


def weights_of(spec: FFNSpec, layers: int = LAYERS, device="cuda") -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator(device).manual_seed(3)
    made = []
    for _ in range(layers):
        unit = {}
        for tensor in spec.unit().tensors:
            values = torch.randn(tensor.shape, generator=generator, device=device, dtype=torch.float32)
            unit[tensor.name] = (values * tensor.shape[-1] ** -0.5).to(tensor.dtype)
        made.append(unit)
    return made


def pool_of(spec, weights, **config) -> WeightPool:
    pool = WeightPool([spec] * len(weights), config=PoolConfig(mode="was", timeout_s=30, device="cuda", **config))
    for layer, unit in enumerate(weights):
        pool.load(layer, unit)
    pool.commit()
    return pool


# A gated FFN squares its input, so a plain chain of them overflows, and NaN equals nothing: tanh keeps it bounded.
def forward(x, pool):
    for layer in range(pool.num_layers):
        x = torch.tanh(x + ffn_forward(x, pool, layer))
    return x


def reference(x, weights, spec):
    for unit in weights:
        x = torch.tanh(x + apply_formula(x, unit, spec))
    return x


def inputs(seed, rows=33, dtype=torch.bfloat16):
    return torch.randn(rows, HIDDEN, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def capture(pool, x):
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward(x, pool)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        y = forward(x, pool)
    return graph, y


def replays_match(pool, x, count, weights, spec):
    """Of `count` replays of one graph, by changed inputs, whether each gave the unpooled result; the graph is gone afterwards."""
    graph, y = capture(pool, x)
    same = []
    for seed in range(count):
        x.copy_(inputs(seed))
        graph.replay()
        same.append(torch.equal(y, reference(x, weights, spec)))
    torch.cuda.synchronize()
    return same

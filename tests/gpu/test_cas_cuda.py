"""CaS on GPUs through WeightPool: 2 and 4 processes over cudaIpc. tests/gpu/run.sh runs it under MPS where ranks share a GPU."""

from __future__ import annotations

import os
import time

import pytest
import torch

import sidp
from launch import parallel_launch, start
from sidp import FFNSpec, PoolConfig, WeightPool, ffn_forward
from sidp._native import C
from sidp.ffn import apply_formula

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif(not getattr(C, "with_cuda", False), reason="the extension was built without CUDA"),
]

LAYERS, HIDDEN, INNER = 8, 256, 704


WIDE = FFNSpec(HIDDEN, INNER)


def weights_of(ctx, spec: FFNSpec, layers: int = LAYERS) -> list[dict[str, torch.Tensor]]:
    """The same on every rank, on the GPU that is the rank's from here on."""
    torch.cuda.set_device(ctx.rank % torch.cuda.device_count())
    generator = torch.Generator("cuda").manual_seed(5)
    return [
        {
            t.name: (
                torch.randn(t.shape, generator=generator, device="cuda")
                * (0.3 if len(t.shape) == 1 else t.shape[-1] ** -0.5)
            ).to(t.dtype)
            for t in spec.unit().tensors
        }
        for _ in range(layers)
    ]


def open_pool(spec, weights, **config) -> WeightPool:
    config = {"timeout_s": 30, "device": "cuda", "force_fetch": True, "slots": 2} | config
    pool = WeightPool([spec] * len(weights), config=PoolConfig(**config))
    for layer, unit in enumerate(weights):
        pool.load(layer, {name: tensor.to(pool.device) for name, tensor in unit.items()})
    pool.commit()
    return pool


def rows_of(rows: int, seed: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def errors(y: torch.Tensor, x: torch.Tensor, unit: dict[str, torch.Tensor], spec: FFNSpec) -> tuple[float, float]:
    """Relative to float64: of ``y``, and of the unpooled formula on this device."""
    exact = apply_formula(x.double(), {name: tensor.double() for name, tensor in unit.items()}, spec)
    norm = exact.norm()
    return ((y.double() - exact).norm() / norm).item(), (
        (apply_formula(x, unit, spec).double() - exact).norm() / norm
    ).item()


def every_layer(ctx, spec, placement, rounds, config) -> list[str]:
    """What was wrong: a layer's result that is further from float64 than the unpooled one."""
    weights, wrong = weights_of(ctx, spec), []
    with open_pool(spec, weights, placement=placement, **config) as pool:
        for seed in range(rounds):
            rows = (1, 7, 33, 128, 300, 3)[seed % 6]
            for layer in range(LAYERS):
                x = rows_of(rows, 100 * ctx.rank + seed, spec.dtype)
                ours, plain = errors(ffn_forward(x, pool, layer), x, weights[layer], spec)
                if not ours <= plain:
                    wrong.append(f"seed {seed} layer {layer}: {ours:.2e}, unpooled {plain:.2e}")
        assert ffn_forward(rows_of(1, 0, spec.dtype)[:0], pool, 1).shape == (0, HIDDEN)
        pool.check()
        stats = pool.stats()
        if config.get("mode") == "cas" and not stats.calls["cas"]:
            wrong.append(f"nothing went by CaS: {stats.calls}")
    return wrong


@pytest.mark.parametrize(
    "spec",
    [
        WIDE,
        FFNSpec(HIDDEN, INNER, bias=True, dtype=torch.float16),
        FFNSpec(HIDDEN, INNER, activation="gelu_tanh", gated=False, bias=True),
        FFNSpec(HIDDEN, 708, activation="gelu"),  # slices that the wide path cannot take
    ],
    ids=["swiglu", "bias-fp16", "plain-gelu", "odd"],
)
@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_cas_processes_are_at_least_as_exact_as_the_unpooled_formula(placement, spec):
    assert parallel_launch(every_layer, 2, spec, placement, 12, {"mode": "cas"}, timeout=45) == [[], []]


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_cas_processes_four_of_them(placement):
    assert parallel_launch(every_layer, 4, WIDE, placement, 12, {"mode": "cas"}, timeout=45) == [[]] * 4


def mixed_body(ctx, placement):
    return every_layer(ctx, WIDE, placement, 12, {"mode": "cas" if ctx.rank % 2 else "was"})


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_cas_processes_beside_ranks_in_was(placement):
    assert parallel_launch(mixed_body, 4, placement, timeout=45) == [[]] * 4


def auto_body(ctx):
    weights = weights_of(ctx, WIDE)
    with open_pool(WIDE, weights, mode="auto") as pool:
        chooser, bad = pool._dispatch.chooser, 0
        for seed in range(120):
            x = rows_of(1 if seed < 60 else 2048, seed)
            for layer in range(LAYERS):
                ours, plain = errors(ffn_forward(x, pool, layer), x, weights[layer], WIDE)
                bad += not ours <= plain
        model = chooser.reason
        return bad, sum(pool.stats().calls.values()), model, pool.stats().last_mode_reason


def test_cas_processes_with_the_policy_choosing():
    for bad, calls, _, reason in parallel_launch(auto_body, 2, timeout=45):
        assert bad == 0 and calls == 120 * LAYERS
        assert "expected to take" in reason or reason == "the layer is here"


def graph_body(ctx, placement):
    weights = weights_of(ctx, WIDE)
    with open_pool(WIDE, weights, mode="cas", placement=placement) as pool:
        x, eager = rows_of(3, ctx.rank), rows_of(9, 7)

        def forward():
            return [ffn_forward(x, pool, layer) for layer in range(LAYERS)]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ys = forward()
        bad = 0
        for seed in range(1000):
            x.copy_(rows_of(3, 10_000 * ctx.rank + seed))
            graph.replay()
            if seed % (7 + ctx.rank) == 0:  # a partner whose batches change
                ours, plain = errors(ffn_forward(eager, pool, seed % LAYERS), eager, weights[seed % LAYERS], WIDE)
                bad += not ours <= plain
            layer = seed % LAYERS
            ours, plain = errors(ys[layer], x, weights[layer], WIDE)
            bad += not ours <= plain
        pool.check()
        torch.cuda.synchronize()
        del graph, ys
        return bad


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_cas_processes_replay_a_thousand_times_beside_a_changing_partner(placement):
    assert parallel_launch(graph_body, 2, placement, timeout=75) == [0, 0]


def early_body(ctx):
    weights = weights_of(ctx, WIDE)
    pool = open_pool(WIDE, weights, mode="cas")
    bad = 0
    if ctx.rank:  # rank 0 has nothing to do: it serves from within close()
        time.sleep(0.5)
        for seed in range(50):
            x = rows_of(4, seed)
            ours, plain = errors(ffn_forward(x, pool, 2 * (seed % 4)), x, weights[2 * (seed % 4)], WIDE)
            bad += not ours <= plain
    pool.close()
    return bad


def test_cas_processes_are_served_by_a_rank_that_has_finished():
    assert parallel_launch(early_body, 2, timeout=45) == [0, 0]


def free_body(ctx):
    """Worst milliseconds that releasing memory takes beside a server: idle, then busy."""
    weights = weights_of(ctx, WIDE)
    with open_pool(WIDE, weights, mode="cas") as pool:
        worst = []
        for busy in (False, True):
            slowest = 0.0
            for seed in range(20):
                held = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
                for layer in range(LAYERS if busy else 0):
                    ffn_forward(rows_of(4, seed), pool, layer)
                del held
                begin = time.perf_counter()
                torch.cuda.empty_cache()
                slowest = max(slowest, time.perf_counter() - begin)
            worst.append(slowest * 1e3)
        if ctx.rank == 0:  # a second allocation that only fits once the allocator has given back what it cached
            free, _ = torch.cuda.mem_get_info()
            first = torch.empty(int(free * 0.5), dtype=torch.uint8, device="cuda")
            del first
            second = torch.empty(int(free * 0.6), dtype=torch.uint8, device="cuda")
            del second
            torch.cuda.empty_cache()
        return worst


def test_cas_processes_hold_up_nobody_who_frees_memory():
    for idle, busy in parallel_launch(free_body, 2, timeout=45):
        assert idle < 200 and busy < 400, "far above the bound of a launch (run 20 ms)"


SELDOM_USED = [
    "acosh", "asinh", "atanh", "digamma", "erfc", "erfinv", "expm1", "frac", "i0", "lgamma", "log1p", "logit", "sinc", "sinh", "tan", "trunc",
]  # fmt: skip


def loading_body(ctx):
    """A kernel is loaded between two requests: what comes later begins only when the servers that run have ended."""
    weights, bad = weights_of(ctx, WIDE), 0
    with open_pool(WIDE, weights, mode="cas") as pool:
        for seed, name in enumerate(SELDOM_USED):
            x, ys = rows_of(3, seed), []
            for layer in range(LAYERS):
                ys.append(ffn_forward(x, pool, layer))
                if layer == seed % LAYERS:
                    getattr(torch, name)(ys[-1].float())
            for layer, y in enumerate(ys):
                ours, plain = errors(y, x, weights[layer], WIDE)
                bad += not ours <= plain
        pool.check()
    return bad


@pytest.mark.parametrize("loading", ["LAZY", "EAGER"])
def test_cas_processes_that_load_kernels_meanwhile(monkeypatch, loading):
    monkeypatch.setenv("CUDA_MODULE_LOADING", loading)
    assert parallel_launch(loading_body, 2, timeout=45) == [0, 0]


def compiled_body(ctx):
    weights = weights_of(ctx, WIDE)
    with open_pool(WIDE, weights, mode="cas") as pool:
        compiled = torch.compile(
            lambda x: ffn_forward(x, pool, 0) + ffn_forward(x, pool, 1), fullgraph=True, backend="aot_eager"
        )
        x = rows_of(5, ctx.rank)
        return torch.equal(compiled(x), ffn_forward(x, pool, 0) + ffn_forward(x, pool, 1))


def test_cas_processes_under_torch_compile():
    assert parallel_launch(compiled_body, 2, timeout=45) == [True, True]


def model_body(ctx, family):
    import models

    torch.cuda.set_device(ctx.rank % torch.cuda.device_count())
    torch.set_default_device("cuda")
    model = models.build(family, torch.bfloat16).cuda()
    exact = models.build(family, torch.bfloat16).cuda().double()
    ids = torch.randint(3, models.VOCAB, (2, 7), generator=torch.Generator("cuda").manual_seed(ctx.rank), device="cuda")
    with torch.no_grad():
        truth, plain = exact(input_ids=ids).logits, model(input_ids=ids).logits.double()
        config = PoolConfig(mode="cas", force_fetch=True, slots=2, timeout_s=30, device="cuda")
        with sidp.pool_model(model, config=config) as pool:
            ours = model(input_ids=ids).logits.double()
            tokens = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False).shape
            calls = pool.stats().calls["cas"]
    return (
        ((ours - truth).norm() / truth.norm()).item(),
        ((plain - truth).norm() / truth.norm()).item(),
        calls,
        tuple(tokens),
    )


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_cas_processes_of_hugging_face(monkeypatch, family):
    from pathlib import Path

    folder = str(Path(__file__).parents[1] / "hf")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(folder)
    for ours, plain, calls, tokens in parallel_launch(model_body, 2, family, timeout=45):
        assert ours <= 1.1 * plain, f"{ours:.3e} with CaS, {plain:.3e} without"  # the rest of the model rounds alike
        assert calls > 0 and tokens == (2, 15)


def killed_body(ctx):
    weights = weights_of(ctx, WIDE)
    pool = open_pool(WIDE, weights, mode="cas", timeout_s=5)
    ffn_forward(rows_of(2, 0), pool, 1)
    torch.cuda.synchronize()
    ctx.say("ready")
    ctx.hear("killed")
    begin = time.perf_counter()
    try:
        for _ in range(3000):
            y = ffn_forward(rows_of(2, 0), pool, 1)
            torch.cuda.current_stream().synchronize()
            assert y.isnan().all() or torch.isfinite(y).all(), "a torn result"
            pool.check()
    finally:
        ctx.say(f"after {time.perf_counter() - begin:.2f} s")
        pool.close()


@pytest.mark.skipif(
    "CUDA_MPS_PIPE_DIRECTORY" in os.environ, reason="MPS gives no promise to clients when one is killed"
)
def test_a_killed_owner_is_named():
    with start(killed_body, 2, timeout=45) as ranks:
        ranks.wait_for("ready")
        ranks.kill(1)
        ranks.tell("killed", ranks=[0])
        first = ranks.join()[0]
    assert first.error == "PeerError" and first.attributes.get("rank") == 1, first


def test_what_cas_cannot_do_on_a_gpu_is_said_before_anything_is_allocated():
    before = torch.cuda.memory_allocated()
    with pytest.raises(sidp.ConfigError, match="host_tier"):
        WeightPool([WIDE], config=PoolConfig(mode="cas", host_tier=True, device="cuda"))
    with pytest.raises(sidp.ConfigError, match="bfloat16 or float16"):
        WeightPool([FFNSpec(64, 64, dtype=torch.float32)], config=PoolConfig(mode="cas", device="cuda"))
    assert torch.cuda.memory_allocated() == before

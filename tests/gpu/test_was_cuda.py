"""WaS on GPUs: the same bits as unpooled, eager and in graphs, on one device. tests/gpu/run.sh runs it under MPS."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import sidp
from chain import HIDDEN, INNER, LAYERS, capture, forward, inputs, pool_of, reference, replays_match, weights_of
from launch import parallel_launch, start
from sidp import FFNSpec, PoolConfig, ffn_forward
from sidp._native import C
from sidp.ffn import apply_formula
from sidp.spill import on_device
from sidp.transport_cuda import device_bytes

sys.path.append(str(Path(__file__).parents[2] / "bench"))  # trace_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif(not getattr(C, "with_cuda", False), reason="the extension was built without CUDA"),
]


@pytest.fixture(params=["events", "words"])
def hand_over(request, monkeypatch):
    monkeypatch.setenv("SIDP_HAND_OVER", request.param)
    monkeypatch.setenv("SIDP_POISON", "1")
    return request.param


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_host_tier_is_bit_identical_in_order_and_out_of_order(hand_over, slots, dtype):
    spec = FFNSpec(HIDDEN, INNER, bias=True, dtype=dtype)
    weights = weights_of(spec)
    with pool_of(spec, weights, host_tier=True, slots=slots) as pool:
        for seed in range(20):
            x = inputs(seed, dtype=dtype)
            assert torch.equal(forward(x, pool), reference(x, weights, spec))
        for layer in (5, 2, 2, 6, 0, 3, 1, 4, 4, 0):
            x = inputs(layer, dtype=dtype)
            assert torch.equal(ffn_forward(x, pool, layer), apply_formula(x, weights[layer], spec))
        assert pool.stats().fetches > 0


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_a_thousand_replays_with_changed_inputs(hand_over, slots):
    spec = FFNSpec(HIDDEN, INNER)
    weights = weights_of(spec)
    with pool_of(spec, weights, host_tier=True, slots=slots) as pool:
        x = inputs(0)
        graph, y = capture(pool, x)
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for seed in range(1000):
            x.copy_(inputs(seed))
            graph.replay()
            wrong += (y != reference(x, weights, spec)).any()
        assert wrong.item() == 0
        assert pool.stats().repairs <= slots
        del graph


def test_eager_and_replay_mixed_two_graphs_alive_and_forwards_left_half_way(hand_over):
    spec = FFNSpec(HIDDEN, INNER)
    weights = weights_of(spec)
    with pool_of(spec, weights, host_tier=True, slots=3) as pool:
        x, x2 = inputs(0), inputs(1, rows=5)
        graph, y = capture(pool, x)
        graph2, y2 = capture(pool, x2)
        single = torch.cuda.CUDAGraph()
        with torch.cuda.graph(single):
            y3 = ffn_forward(x2, pool, 4)
        for seed in range(60):
            x.copy_(inputs(seed))
            x2.copy_(inputs(seed + 1, rows=5))
            kind = (seed * 7 + seed // 5) % 5
            if kind == 0:
                graph.replay()
                assert torch.equal(y, reference(x, weights, spec)), seed
            elif kind == 1:
                graph2.replay()
                assert torch.equal(y2, reference(x2, weights, spec)), seed
            elif kind == 2:
                assert torch.equal(forward(x, pool), reference(x, weights, spec)), seed
            elif kind == 3:
                single.replay()
                assert torch.equal(y3, apply_formula(x2, weights[4], spec)), seed
            else:
                for layer in range(seed % LAYERS):
                    assert torch.equal(ffn_forward(x, pool, layer), apply_formula(x, weights[layer], spec)), seed
        del graph, graph2, single


def test_torch_compile_sees_one_operator():
    spec = FFNSpec(HIDDEN, INNER)
    weights = weights_of(spec)
    with pool_of(spec, weights, host_tier=True, slots=3) as pool:
        compiled = torch.compile(
            lambda x: ffn_forward(x, pool, 2) + ffn_forward(x, pool, 3), fullgraph=True, backend="aot_eager"
        )
        for seed in range(3):
            x = inputs(seed)
            expected = apply_formula(x, weights[2], spec) + apply_formula(x, weights[3], spec)
            assert torch.equal(compiled(x), expected)


def test_freed_memory_is_what_the_driver_shows():
    spec = FFNSpec(4096, 8192)
    weights = weights_of(spec, layers=12, device="cpu")
    torch.cuda.synchronize()
    torch.zeros(1, device="cuda")
    before = torch.cuda.mem_get_info()[0]
    pool = pool_of(spec, weights, host_tier=True, slots=2)
    stats = pool.stats()
    taken = before - torch.cuda.mem_get_info()[0]
    assert abs(taken - (stats.owned_bytes + stats.ring_bytes)) <= 0.02 * stats.replicated_bytes
    pool.close()
    assert abs(before - torch.cuda.mem_get_info()[0]) <= 0.02 * stats.replicated_bytes


def group_body(ctx, placement, force_fetch, graphs):
    torch.cuda.set_device(0)
    spec = FFNSpec(HIDDEN, INNER)
    weights = weights_of(spec, layers=9)
    with pool_of(spec, weights, placement=placement, force_fetch=force_fetch, slots=2) as pool:
        assert pool.active
        same = []
        for seed in range(30):
            x = inputs(100 * ctx.rank + seed)
            same.append(torch.equal(forward(x, pool), reference(x, weights, spec)))
        if graphs:
            x = inputs(ctx.rank)
            same += replays_match(pool, x, 100, weights, spec)
        return all(same), pool.stats().fetches


@pytest.fixture(params=["ipc", "vmm"])
def handles(request, monkeypatch):
    """Both ways to reach another process's device memory; what they carry is tested by the same cases."""
    monkeypatch.setenv("SIDP_P2P", request.param)
    if request.param == "vmm" and C.vmm_refusal(0):
        pytest.skip(f"VMM handles: {C.vmm_refusal(0)}")
    return request.param


@pytest.mark.parametrize("placement", ["layer", "striped"])
@pytest.mark.parametrize("world", [2, 4])
def test_processes_on_one_gpu(handles, world, placement, monkeypatch):
    monkeypatch.setenv("SIDP_POISON", "1")
    for same, fetches in parallel_launch(group_body, world, placement, True, True, timeout=100):
        assert same and fetches > 0


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_processes_whose_readers_take_no_turns(placement, monkeypatch):
    monkeypatch.setenv("SIDP_POISON", "1")
    monkeypatch.setenv("SIDP_TURNS", "0")
    for same, fetches in parallel_launch(group_body, 4, placement, True, True, timeout=100):
        assert same and fetches > 0


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_processes_hand_over_by_words(placement, monkeypatch):
    monkeypatch.setenv("SIDP_HAND_OVER", "words")
    monkeypatch.setenv("SIDP_POISON", "1")
    for same, fetches in parallel_launch(group_body, 2, placement, True, True, timeout=100):
        assert same and fetches > 0


def test_owners_on_the_same_gpu_are_read_in_place(handles):
    assert parallel_launch(group_body, 2, "layer", False, True, timeout=90) == [(True, 0)] * 2


def test_host_memory_where_gpus_cannot_reach_each_other(monkeypatch):
    monkeypatch.setenv("SIDP_P2P", "host")
    for same, fetches in parallel_launch(group_body, 2, "layer", True, False, timeout=90):
        assert same and fetches > 0


def killed_body(ctx):
    torch.cuda.set_device(0)
    spec = FFNSpec(HIDDEN, INNER)
    weights = weights_of(spec)
    pool = pool_of(spec, weights, force_fetch=True, slots=2)
    forward(inputs(0), pool)
    torch.cuda.synchronize()
    ctx.say("ready")
    ctx.hear("killed")
    try:
        for _ in range(3000):
            forward(inputs(0), pool)
            torch.cuda.synchronize()
    finally:
        pool.close()


@pytest.mark.skipif(
    "CUDA_MPS_PIPE_DIRECTORY" in os.environ, reason="MPS gives no promise to clients when one is killed"
)
def test_a_killed_rank_is_named(handles):
    with start(killed_body, 2, timeout=90) as ranks:
        ranks.wait_for("ready")
        ranks.kill(1)
        ranks.tell("killed", ranks=[0])
        first = ranks.join()[0]
    assert first.error == "PeerError" and first.attributes.get("rank") == 1, first


def model_body(ctx, families):
    import models

    torch.cuda.set_device(0)
    torch.set_default_device("cuda")
    wrong = []
    for family in families:
        model = models.build(family, torch.bfloat16).cuda()
        ids = torch.randint(
            3, models.VOCAB, (2, 7), generator=torch.Generator("cuda").manual_seed(ctx.rank), device="cuda"
        )
        with torch.no_grad():
            expected = model(input_ids=ids).logits, model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
            config = PoolConfig(mode="was", force_fetch=True, slots=2, timeout_s=30)
            with sidp.pool_model(model, config=config):
                got = model(input_ids=ids).logits, model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
            wrong.append(family)
    return wrong


def spilled_body(ctx, placement):
    torch.cuda.set_device(0)
    spec = FFNSpec(HIDDEN, INNER, bias=True)
    weights = weights_of(spec, layers=9)
    unit = spec.unit().nbytes
    with pool_of(spec, weights, placement=placement, host_tier=True, device_bytes=2 * unit, slots=2) as pool:
        stats = pool.stats()
        sides = {on_device(pool.placement, ctx.rank, layer, stats.owned_bytes) for layer in range(9)}
        same = [torch.equal(forward(x, pool), reference(x, weights, spec)) for x in map(inputs, range(20))]
        x = inputs(ctx.rank)
        same += replays_match(pool, x, 30, weights, spec)
        return all(same), pool.stats().fetches > 0, 0 < stats.owned_bytes <= 2 * unit, sides


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_processes_spill_into_host_memory(handles, placement):
    assert parallel_launch(spilled_body, 2, placement, timeout=100) == [(True, True, True, {True, False})] * 2


def test_one_gpu_keeps_some_units_and_fetches_the_rest(hand_over):
    spec = FFNSpec(HIDDEN, INNER)
    weights, unit = weights_of(spec), spec.unit().nbytes
    with pool_of(spec, weights, host_tier=True, device_bytes=3 * unit + 1, slots=2) as pool:
        for seed in range(10):
            x = inputs(seed)
            assert torch.equal(forward(x, pool), reference(x, weights, spec))
        stats = pool.stats()
        assert stats.calls == {"local": 30, "was": 10 * (LAYERS - 3), "cas": 0}
        assert 3 * unit <= stats.owned_bytes < 4 * unit and stats.fetches > 0


FAMILIES_A = [
    "llama",
    "llama_bias_tied",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "glm",
    "gpt2",
    "opt",
]
FAMILIES_B = ["falcon", "falcon_bias", "falcon_new", "gpt_neox", "gptj", "stablelm", "olmo2", "starcoder2", "cohere", "granite",
              "nemotron"]  # fmt: skip


@pytest.fixture
def hf_models(monkeypatch):
    """The tiny models of the CPU tests, importable here and in the ranks."""
    folder = str(Path(__file__).parents[1] / "hf")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize("families", [FAMILIES_A, FAMILIES_B], ids=["first half", "second half"])
def test_families_of_hugging_face_are_bit_identical(hf_models, families):
    assert parallel_launch(model_body, 2, families, timeout=120) == [[], []]


def batching_body(ctx):
    import models
    import transformers

    from sidp.batch.paged import batching_config

    torch.cuda.set_device(0)
    model = models.build("llama", torch.bfloat16).cuda()
    settings = batching_config(16, num_blocks=32, max_batch_tokens=64)
    options = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
    prompts = models.prompt(ctx.rank, rows=4 + ctx.rank)["input_ids"].tolist()

    def tokens():
        results = model.generate_batch(inputs=prompts, generation_config=options, continuous_batching_config=settings)
        return [result.generated_tokens for result in results.values()]

    with torch.no_grad():
        expected = tokens()
        with sidp.pool_model(model, config=PoolConfig(mode="was", force_fetch=True, slots=2, timeout_s=30)) as pool:
            same = tokens() == expected
            return len(expected) == len(prompts) and same, pool.stats().fetches > 0


def test_families_under_continuous_batching(hf_models):
    assert parallel_launch(batching_body, 2, timeout=120) == [(True, True)] * 2


def test_vmm_memory_maps_reads_and_frees():
    if C.vmm_refusal(0):
        pytest.skip(f"VMM handles: {C.vmm_refusal(0)}")
    token, nbytes = os.urandom(16), 96 << 20
    values = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda")
    assert torch.equal(values.clone(), values)  # loads the kernels that are used below: they take memory too
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    arena = C.CudaArena(0, 2, token, nbytes, 0, "vmm")
    handle = arena.handle()
    assert before - torch.cuda.mem_get_info()[0] >= nbytes
    device_bytes(arena.extents, nbytes, arena, torch.device("cuda", 0)).copy_(values)
    mapping = C.CudaPeerMapping(
        handle, 0, 2, token, nbytes, 0, arena.share()
    )  # a descriptor may come back to its own process
    assert mapping.extents != arena.extents
    assert torch.equal(device_bytes(mapping.extents, nbytes, mapping, torch.device("cuda", 0)), values)
    with pytest.raises(sidp.SidpError, match="kind"):
        C.CudaPeerMapping(handle, 0, 2, token, nbytes, 0)
    torch.cuda.synchronize()
    mapping.close()
    arena.close()
    torch.cuda.empty_cache()
    assert abs(before - torch.cuda.mem_get_info()[0]) <= 4 << 20


def test_nothing_waits_on_the_hot_path(tmp_path):
    from torch.profiler import ProfilerActivity, profile, record_function
    from trace_table import table, waits

    spec = FFNSpec(HIDDEN, INNER)
    weights = weights_of(spec)
    with pool_of(spec, weights, host_tier=True, slots=3) as pool:
        x = inputs(0)
        graph, _ = capture(pool, x)
        for _ in range(3):
            forward(x, pool)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            with record_function("hot path"):
                for _ in range(3):
                    forward(x, pool)
                    graph.replay()
            torch.cuda.synchronize()
        profiler.export_chrome_trace(str(tmp_path / "trace.json"))
        rows = table(tmp_path / "trace.json", "hot path")
        copies = sum(count for category, name, count, _ in rows if name.startswith("cudaMemcpyAsync"))
        assert copies >= 3 * LAYERS, rows  # the profiler sees the native ring's own calls
        assert waits(rows) == [], rows
        del graph

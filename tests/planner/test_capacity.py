"""Bytes and KV tokens: against sums by hand, against real pools' stats, and against the paper's statements."""

import json

import pytest

from launch import start
from sidp.batch.attention import DECODE_PAGE
from sidp.batch.memory import SPARE_PAGES
from sidp.config import PoolConfig
from sidp.errors import ConfigError
from sidp.planner.advice import make_plan
from sidp.planner.capacity import Deployment, pooled, replicated
from sidp.planner.families import shape_of
from sidp.planner.gpus import GPUS, load_gpu
from sidp.planner.models import load_model


def deployment(model="Llama-3.1-70B", gpu="h200", dp=8, tp=1, **rest):
    return Deployment(load_model(model) if isinstance(model, str) else model, load_gpu(gpu), dp, tp, **rest)


def tiny(layers=6, **changes):
    config = {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "torch_dtype": "float32",
    }
    return shape_of({**config, **changes}, "tiny")


# ---- sums by hand ---------------------------------------------------------------------------------------------------


def test_70b_over_eight_gpus_byte_by_byte():
    d = deployment()
    layer = 3 * 8192 * 28672 * 2
    other = (70_553_706_496 - 80 * 3 * 8192 * 28672) * 2
    plan = pooled(d, "striped", 2)
    assert plan.ffn_bytes == (10 * layer,) * 8
    assert plan.ring_bytes == (2 * layer,) * 8
    assert plan.other_bytes == other
    assert plan.fetched_bytes == (70 * layer,) * 8
    left = int(d.gpu.memory_bytes * 0.9) - other - 12 * layer - plan.activation_bytes - 2**30
    assert plan.kv_bytes(3) == left
    assert plan.kv_tokens(3) == left // 327_680
    assert plan.node_kv_tokens == 8 * (left // 327_680)
    assert plan.batch == left // 327_680 // 1024


def test_ring_bytes_of_the_design():
    """2 slots against a cycle's 7: 2.8 GB and 9.9 GB for 70B at D=8."""
    assert round(pooled(deployment(), "striped", 2).ring_bytes[0] / 1e9, 1) == 2.8
    assert round(pooled(deployment(), "layer", 7).ring_bytes[0] / 1e9, 1) == 9.9


def test_tensor_parallelism_cuts_ffn_and_cache_but_not_norms():
    one, two = replicated(deployment(dp=4, tp=1)), replicated(deployment(dp=4, tp=2))
    assert two.ffn_bytes[0] * 2 == one.ffn_bytes[0]
    assert two.kv_bytes_per_token * 2 == one.kv_bytes_per_token
    norms = load_model("Llama-3.1-70B").by_kind()["norms"] * 2
    assert two.other_bytes * 2 - one.other_bytes == norms


def test_ranks_that_own_more_layers_have_less_cache():
    plan = pooled(deployment(dp=3), "layer")  # 27, 27 and 26 layers
    assert len(set(plan.ffn_bytes)) == 2 and plan.tightest == 0
    assert plan.node_kv_tokens == sum(plan.kv_tokens(rank) for rank in range(3))


def test_unequal_layers_take_slots_of_the_largest():
    plan = pooled(deployment(tiny(4, intermediate_size=[64, 512, 64, 128]), dp=2), "layer", 1)
    assert plan.ring_bytes == (3 * 64 * 512 * 4,) * 2  # a multiple of 4096 already
    assert sum(plan.ffn_bytes) == 3 * 64 * (64 + 512 + 64 + 128) * 4


def test_ranks_on_one_gpu_split_its_memory_and_read_each_other_in_place():
    model = tiny(10)
    d = deployment(model, "h100", dp=4, ranks_per_gpu=2, reserve_bytes=2**20)
    plan, base = pooled(d, "layer"), replicated(d)
    assert base.usable_bytes == int(d.gpu.memory_bytes * 0.9) // 2
    layer = 3 * 64 * 256 * 4
    assert plan.ffn_bytes == (3 * layer, 3 * layer, 2 * layer, 2 * layer)
    # Ranks 0 and 2 are on one GPU, and own 5 of the 10 layers between them.
    assert plan.fetched_bytes == (5 * layer,) * 4
    alone = pooled(deployment(model, "h100", dp=4, ranks_per_gpu=4), "layer")
    assert alone.active and alone.ring_bytes == alone.fetched_bytes == (0,) * 4 and alone.slots == (0,) * 4
    assert pooled(d, "striped").fetched_bytes[0] > plan.fetched_bytes[0]  # cut layers are fetched from everybody
    for wrong in ({"ranks_per_gpu": 3}, {"ranks_per_gpu": 2, "tp": 2}, {"engine": "none"}, {"sampled": 0}):
        with pytest.raises(ConfigError):
            deployment(model, "h100", **{"dp": 4, **wrong})


def test_an_engine_that_copies_what_it_reads_holds_less():
    ours, theirs = (replicated(deployment("Qwen3-14B", "h100", dp=2, engine=name)) for name in ("vllm", "transformers"))
    per_token = 2 * 40 * 8 * 128 * 2
    assert ours.kv_bytes(0) - theirs.kv_bytes(0) == (SPARE_PAGES * DECODE_PAGE + DECODE_PAGE // 2) * per_token
    assert theirs.kv_tokens(0) == theirs.kv_bytes(0) // (per_token + per_token // 40 + 16)
    few, many = (deployment("Qwen3-14B", "h100", dp=2, sampled=n, batched_tokens=2048) for n in (64, 1024))
    assert few.activation_bytes() == 2048 * 3 * (17408 + 5120) * 2
    assert many.activation_bytes() == 1024 * 151936 * 10


# ---- against real pools ---------------------------------------------------------------------------------------------


def _stats(ctx, config, placement, slots):
    import torch

    import sidp

    units = shape_of(json.loads(config), "tiny").units()
    settings = PoolConfig(mode="was", placement=placement, slots=slots, device="cpu", timeout_s=60)
    with sidp.WeightPool(units, config=settings) as pool:
        for layer, unit in enumerate(units):
            pool.load(layer, {spec.name: torch.zeros(spec.shape, dtype=spec.dtype) for spec in unit.tensors})
        pool.commit()
        for layer in range(pool.num_layers):
            pool.acquire(layer)
            pool.release(layer)
        stats = pool.stats()
        return stats.replicated_bytes, stats.owned_bytes, stats.ring_bytes, stats.freed_bytes, stats.slots, stats.active


_POOL_CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": [200, 200, 72, 200, 136, 200, 200, 200, 200],
    "num_hidden_layers": 9,
    "num_attention_heads": 4,
    "mlp_bias": True,
}


@pytest.mark.parametrize(("placement", "slots"), [("layer", None), ("striped", None), ("striped", 2), ("layer", 1)])
def test_a_pool_of_two_ranks_reports_what_was_planned(placement, slots):
    plan = pooled(deployment(shape_of(_POOL_CONFIG, "tiny"), dp=2), placement, slots)
    base = replicated(deployment(shape_of(_POOL_CONFIG, "tiny"), dp=2))
    with start(_stats, 2, json.dumps(_POOL_CONFIG), placement, slots, timeout=120) as ranks:
        outcomes = ranks.join()
    assert [out.error for out in outcomes] == ["", ""], outcomes
    for rank, out in enumerate(outcomes):
        total, owned, ring, freed, used, active = out.value
        assert (total, owned, ring) == (base.ffn_bytes[rank], plan.ffn_bytes[rank], plan.ring_bytes[rank])
        assert freed == plan.kv_bytes(rank) - base.kv_bytes(rank)
        assert used == plan.slots[rank]
        assert active is plan.active is True


def test_a_group_of_one_stays_local_like_the_pool():
    """In this process, no group: the pool of one rank frees nothing and says so."""
    import torch

    import sidp

    model = tiny()
    plan = pooled(deployment(model, dp=1), "layer")
    units = model.units()
    with sidp.WeightPool(units, config=PoolConfig(device="cpu")) as pool:
        for layer, unit in enumerate(units):
            pool.load(layer, {spec.name: torch.zeros(spec.shape) for spec in unit.tensors})
        pool.commit()
        stats = pool.stats()
    assert (stats.owned_bytes, stats.ring_bytes) == (plan.ffn_bytes[0], plan.ring_bytes[0])
    assert stats.active is plan.active is False
    assert stats.reason == plan.reason


@pytest.mark.parametrize("kind", ["layer", "striped"])
@pytest.mark.parametrize("dp", [2, 3, 4, 8])
def test_planned_bytes_are_the_native_placements(kind, dp):
    from sidp._native import C
    from sidp.shares import unit_layout

    model = tiny(11)
    plan = pooled(deployment(model, dp=dp), kind)
    native = C.Placement(kind, [unit_layout(unit) for unit in model.units()], dp)
    slots = [C.default_slots(native, rank) for rank in range(dp)]
    if plan.active:
        assert list(plan.slots) == slots
        assert list(plan.ffn_bytes) == [native.arena_bytes(rank) for rank in range(dp)]
        assert sum(plan.ffn_bytes) == native.replicated_bytes
    else:
        kept = sum(native.arena_bytes(r) + slots[r] * native.largest_unit_bytes for r in range(dp))
        assert kept >= dp * native.replicated_bytes


def test_pooling_that_frees_nothing_is_declined_like_the_pool():
    plan = pooled(deployment(tiny(2), dp=2), "layer")
    assert not plan.active and "free nothing" in plan.reason
    assert plan.kv_bytes(0) == replicated(deployment(tiny(2), dp=2)).kv_bytes(0)


# ---- against the paper ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["Llama-3.1-70B", "Qwen2.5-72B"])
def test_70b_at_tp_1_fits_141_gb_only_pooled(model):
    for gpu in ("h20-141", "h200"):
        plan = make_plan(deployment(model, gpu))
        assert not plan.replicated.memory.fits
        assert all(option.memory.node_kv_tokens > 1.0e6 for option in plan.pooled)
        assert plan.gain(plan.pooled[0]) is None


@pytest.mark.parametrize(("model", "low", "high"), [("Llama-3.1-70B", 1.6, 1.7), ("Qwen2.5-72B", 1.65, 1.75)])
def test_about_1_7_times_the_tokens_at_tp_2_dp_4_on_141_gb(model, low, high):
    plan = make_plan(deployment(model, "h200", 4, 2))
    assert all(low < plan.gain(option) < high for option in plan.pooled)


def test_small_weights_do_not_pay():
    plan = make_plan(deployment("Llama-3.1-8B"))
    assert plan.best is plan.replicated
    assert "does not pay" in plan.advice[0] and "under 8%" in plan.advice[0]


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tp": 3}, "tp=3 does not divide"),
        ({"dp": 0}, "dp must be"),
        ({"seq": 0}, "seq must be"),
        ({"prompt": 1024}, "prompt must be"),
        ({"utilization": 1.5}, "utilization"),
        ({"reserve_bytes": -1}, "reserve"),
    ],
)
def test_a_bad_deployment_is_named(changes, words):
    with pytest.raises(ConfigError, match=words):
        deployment(**changes)


def test_bad_pools_are_named():
    with pytest.raises(ConfigError, match="dp=8 is more than the 6 layers"):
        pooled(deployment(tiny(6)), "layer")
    with pytest.raises(ConfigError, match=r"slots=71 is out of range.*70 layers"):
        pooled(deployment(), "layer", 71)
    with pytest.raises(ConfigError, match="placement must be one of"):
        pooled(deployment(), "round")
    assert {option.name for option in make_plan(deployment(tiny(6, intermediate_size=6400))).pooled} == {"striped"}


def test_unknown_gpus_are_named():
    with pytest.raises(ConfigError, match="expected one of h20, h20-141, h100, h200, b200, measured"):
        load_gpu("a100")
    assert all("datasheet" in gpu.source for gpu in GPUS.values())


@pytest.mark.parametrize(("model", "dp", "tp", "reached"), [("Qwen3-32B", 8, 1, True), ("Qwen2.5-72B", 4, 2, False)])
@pytest.mark.parametrize("gpu", ["h20-141", "b200"])
def test_where_a_ring_of_a_cycle_gives_1_8_striping_gives_1_9_at_dp_8_only(gpu, model, dp, tp, reached):
    def gain(utilization, kind, slots=None):
        d = deployment(model, gpu, dp, tp, utilization=utilization)
        return pooled(d, kind, slots).node_kv_tokens / max(1, replicated(d).node_kv_tokens)

    low, high = 0.3, 0.95  # the gain falls as memory grows
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if gain(middle, "layer") > 1.8 else (low, middle)
    assert gain(high, "layer") == pytest.approx(1.8, abs=1e-3)
    assert (gain(high, "striped") >= 1.9) is (gain(high, "striped", 2) >= 1.9) is reached

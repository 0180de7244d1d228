"""WeightPool end to end on the CPU backend: right bytes in every placement, and clear errors for bad input."""

import random

import pytest
import torch

from launch import parallel_launch
from sidp import ConfigError, FFNSpec, LayoutError, PoolClosedError, PoolConfig, WeightPool, ffn_forward
from sidp.ffn import apply_formula

LAYERS = 9


def random_weights(specs, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        {t.name: torch.randn(t.shape, generator=generator).to(t.dtype) for t in spec.unit().tensors} for spec in specs
    ]


def make_pool(specs, weights, **config):
    pool = WeightPool(specs, config=PoolConfig(timeout_s=20, **config))
    for layer, tensors in enumerate(weights):
        pool.load(layer, tensors)
    pool.commit()
    return pool


def check_layer(pool, specs, weights, layer, rows=3):
    x = torch.randn(rows, specs[layer].hidden_size).to(specs[layer].dtype)
    expected = apply_formula(x, weights[layer], specs[layer])
    assert torch.equal(ffn_forward(x, pool, layer), expected), layer


def body_forwards(ctx, specs, seed, config):
    torch.set_num_threads(1)
    weights = random_weights(specs, seed)
    with make_pool(specs, weights, **config) as pool:
        for _ in range(4):
            for layer in range(len(specs)):
                check_layer(pool, specs, weights, layer)
        return pool.stats()


def body_random_order(ctx, specs, seed, config):
    torch.set_num_threads(1)
    weights = random_weights(specs, seed)
    rng = random.Random(ctx.rank)
    with make_pool(specs, weights, **config) as pool:
        for _ in range(150):
            check_layer(pool, specs, weights, rng.randrange(len(specs)))
        return pool.stats()


SPEC = FFNSpec(32, 96, dtype=torch.float32, bias=True)
MIXED = [
    FFNSpec(32, 64, dtype=torch.bfloat16),
    FFNSpec(32, 200, "gelu_tanh", gated=False, bias=True, dtype=torch.float16),
    FFNSpec(16, 72, "relu2", gated=False, dtype=torch.float32),
    FFNSpec(32, 96, "gelu", bias=True, dtype=torch.bfloat16),
    FFNSpec(48, 33, "relu", dtype=torch.float32),
]


@pytest.mark.parametrize("placement", ["layer", "striped"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("config", [{"slots": 1}, {"slots": 2}, {}, {"peak_shifting": False}, {"resident_layers": 2}])
def test_was_is_bit_identical_with_unpooled_weights(world, placement, config):
    if world == 1:
        config = {name: value for name, value in config.items() if name != "slots"}
    stats = parallel_launch(body_forwards, world, [SPEC] * LAYERS, 7, {"placement": placement, **config})
    for s in stats:
        assert s.active == (world > 1)
        if s.active:
            assert s.fetches > 0 and s.restarts == 0
            assert s.freed_bytes == s.replicated_bytes - s.owned_bytes - s.ring_bytes


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_units_of_unequal_size_kind_and_dtype_share_the_ring(placement):
    stats = parallel_launch(body_forwards, 3, MIXED * 2, 3, {"placement": placement, "slots": 2})
    assert all(s.active for s in stats)


@pytest.mark.parametrize("placement", ["layer", "striped"])
@pytest.mark.parametrize("slots", [1, 3])
def test_layers_in_any_order_are_right(placement, slots):
    stats = parallel_launch(body_random_order, 3, [SPEC] * LAYERS, 5, {"placement": placement, "slots": slots})
    assert all(s.restarts > 0 for s in stats)


def test_poisoned_slots_never_reach_a_reader(monkeypatch):
    monkeypatch.setenv("SIDP_POISON", "1")
    monkeypatch.setenv("SIDP_CPU_LINK_GBPS", "0.05")  # slow enough that every use waits for its bytes
    stats = parallel_launch(body_forwards, 2, [SPEC] * LAYERS, 11, {"slots": 1})
    assert all(s.stalls > 0 and s.stall_seconds > 0 for s in stats)


def body_every_byte_once(ctx, config):
    torch.set_num_threads(1)
    weights = random_weights([SPEC] * LAYERS, 1)
    with make_pool([SPEC] * LAYERS, weights, **config) as pool:
        for _ in range(3):
            for layer in range(LAYERS):
                pool.acquire(layer)
                pool.release(layer)
        stats = pool.stats()
    remote = sum(
        sum(op.width * op.height for op in pool.placement.copies(layer, ctx.rank) if op.owner != ctx.rank)
        for layer in range(LAYERS)
    )
    return stats.fetched_bytes, remote


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_a_forward_fetches_each_remote_byte_once(placement):
    """Three forwards and at most one ring of prefetch for the fourth."""
    for fetched, remote in parallel_launch(body_every_byte_once, 3, {"placement": placement, "slots": 2}):
        assert 3 * remote <= fetched + remote and fetched <= 4 * remote


def body_nested(ctx):
    weights = random_weights([SPEC] * 6, 1)
    with make_pool([SPEC] * 6, weights, slots=1) as pool:
        remote = [layer for layer in range(6) if layer % 2 != ctx.rank]
        pool.acquire(remote[0])
        pool.acquire(remote[0])
        with pytest.raises(ConfigError, match=rf"layer {remote[1]} shares slot 0 with layer {remote[0]}"):
            pool.acquire(remote[1])
        pool.release(remote[0])
        pool.release(remote[0])
        with pytest.raises(ConfigError, match="released without being acquired"):
            pool.release(remote[0])
        pool.acquire(remote[1])
        pool.release(remote[1])


def test_nested_uses_count_and_a_slot_in_use_is_never_taken():
    parallel_launch(body_nested, 2)


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.fixture
def single():
    pool = WeightPool([SPEC] * 2)
    yield pool
    pool.close()


def test_wrong_tensors_are_refused_with_value_expectation_and_mend(single):
    good = random_weights([SPEC], 0)[0]
    with pytest.raises(LayoutError, match=r"'gate' of layer 0 must be \(96, 32\).*got \(32, 96\)"):
        single.load(0, {**good, "gate": good["gate"].t()})
    with pytest.raises(LayoutError, match=r"'up' of layer 0 must be .*float32, got .*bfloat16"):
        single.load(0, {**good, "up": good["up"].bfloat16()})
    with pytest.raises(LayoutError, match=r"missing: \['down'\]"):
        single.load(0, {name: t for name, t in good.items() if name != "down"})
    with pytest.raises(LayoutError, match=r"unknown: \['extra'\]"):
        single.load(0, {**good, "extra": good["up"]})
    with pytest.raises(LayoutError, match="meta device"):
        single.load(0, {**good, "up": good["up"].to("meta")})
    with pytest.raises(ConfigError, match=r"layer 2 does not exist: the pool has layers 0 ... 1"):
        single.load(2, good)
    single.load(0, good)
    with pytest.raises(ConfigError, match="loaded already"):
        single.load(0, good)


def test_the_order_of_calls_is_checked(single):
    with pytest.raises(ConfigError, match="not committed yet"):
        ffn_forward(torch.randn(1, 32), single, 0)
    single.load(0, random_weights([SPEC], 0)[0])
    with pytest.raises(ConfigError, match=r"commit\(\) before everything was loaded: layer 1: down"):
        single.commit()
    with pytest.raises(PoolClosedError, match="closed"):
        single.load(1, random_weights([SPEC], 0)[0])


def test_a_committed_pool_takes_no_more_weights_and_a_closed_one_nothing():
    weights = random_weights([SPEC] * 2, 0)
    pool = make_pool([SPEC] * 2, weights)
    with pytest.raises(ConfigError, match=r"after commit\(\)"):
        pool.load(0, weights[0])
    with pytest.raises(ConfigError, match="once is enough"):
        pool.commit()
    kept = pool.tensors(0)["up"]
    pool.close()
    pool.close()
    assert kept.shape == (96, 32) and torch.equal(kept, weights[0]["up"])  # a view outlives the pool, never dangles
    for call in (lambda: ffn_forward(torch.randn(1, 32), pool, 0), lambda: pool.acquire(0), lambda: pool.tensors(0)):
        with pytest.raises(PoolClosedError, match="closed"):
            call()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 31), r"x is \(2, 31\)"),
        (torch.randn(2, 32, dtype=torch.float64), "float64"),
        (torch.randn(2, 32, device="meta"), "meta"),
    ],
)
def test_ffn_forward_refuses_input_that_does_not_fit(x, message):
    with make_pool([SPEC], random_weights([SPEC], 0)) as pool, pytest.raises(LayoutError, match=message):
        ffn_forward(x, pool, 0)


def test_ffn_forward_takes_any_leading_shape_and_no_rows():
    weights = random_weights([SPEC], 0)
    with make_pool([SPEC], weights) as pool:
        for shape in [(32,), (0, 32), (2, 3, 32), (1, 0, 4, 32)]:
            assert ffn_forward(torch.randn(shape), pool, 0).shape == shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "push"}, "mode must be one of auto, was, cas, local, got 'push'"),
        ({"placement": "ring"}, "placement must be 'layer' or 'striped', got 'ring'"),
        ({"slots": 0}, "slots must be an integer of 1 or more, got 0"),
        ({"resident_layers": -1}, "resident_layers must be an integer of 0 or more, got -1"),
        ({"timeout_s": 0}, "timeout_s must be a positive number"),
    ],
)
def test_config_names_the_bad_value(arguments, message):
    with pytest.raises(ConfigError, match=message):
        PoolConfig(**arguments)


def test_config_reads_the_environment_and_an_explicit_argument_wins(monkeypatch):
    monkeypatch.setenv("SIDP_SLOTS", "5")
    monkeypatch.setenv("SIDP_PEAK_SHIFTING", "off")
    assert PoolConfig().slots == 5 and PoolConfig(slots=2).slots == 2
    assert PoolConfig().peak_shifting is False
    monkeypatch.setenv("SIDP_SLOTS", "many")
    with pytest.raises(ConfigError, match="SIDP_SLOTS='many'"):
        PoolConfig()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be an integer of 1 or more, got 0"),
        ({"activation": "tanh"}, "activation must be one of silu"),
        ({"dtype": torch.int8}, "dtype must be one of"),
    ],
)
def test_spec_names_the_bad_value(arguments, message):
    with pytest.raises(ConfigError, match=message):
        FFNSpec(**{"hidden_size": 4, "intermediate_size": 8, **arguments})


def body_disagree(ctx, what):
    specs, config = [SPEC] * 4, {}
    if ctx.rank == 1 and what == "layers":
        specs = [SPEC] * 5
    if ctx.rank == 1 and what == "spec":
        specs = [SPEC] * 3 + [FFNSpec(32, 64, dtype=torch.float32)]
    if ctx.rank == 1 and what == "config":
        config = {"placement": "striped"}
    if ctx.rank == 1 and what == "local error":
        config = {"resident_layers": 7}
    try:
        WeightPool(specs, config=PoolConfig(timeout_s=20, **config))
    except ConfigError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("layers", ["disagree on the number of layers (4 and 5)"]),
        ("spec", ["disagree on layer 3"]),
        ("config", ["disagree on config.placement (layer and striped)"]),
        ("local error", ["resident_layers=7", "4 layers"]),
    ],
)
def test_ranks_that_disagree_all_raise_the_same_error(what, words):
    for message in parallel_launch(body_disagree, 3, what):
        for word in words:
            assert word in message


def body_bad_slots(ctx, config, layers):
    try:
        WeightPool([SPEC] * layers, config=PoolConfig(timeout_s=20, **config))
    except ConfigError as error:
        return str(error)
    return "no error"


def test_slots_out_of_range_and_a_group_larger_than_the_layers_are_refused():
    for message in parallel_launch(body_bad_slots, 2, {"slots": 4}, 6):
        assert "slots=4 is out of range: a rank reaches 3 layers remotely" in message
    for message in parallel_launch(body_bad_slots, 4, {}, 3):
        assert "a group of 4 ranks is larger than the 3 layers" in message


def body_missing(ctx):
    pool = WeightPool([SPEC] * 4, config=PoolConfig(timeout_s=20))
    for layer, tensors in enumerate(random_weights([SPEC] * 4, 0)):
        if not (ctx.rank == 1 and layer == 1):
            pool.load(layer, tensors)
    try:
        pool.commit()
    except ConfigError as error:
        return str(error)
    return "no error"


def test_a_layer_that_was_never_loaded_fails_the_commit_on_every_rank():
    for message in parallel_launch(body_missing, 3):
        assert "before everything was loaded: layer 1: " in message


def body_cannot_pay(ctx):
    weights = random_weights([SPEC] * 2, 0)
    with make_pool([SPEC] * 2, weights) as pool:
        check_layer(pool, [SPEC] * 2, weights, 1)
        return pool.stats()


def test_where_pooling_frees_nothing_weights_stay_local_and_the_reason_is_told():
    for stats in parallel_launch(body_cannot_pay, 2):
        assert not stats.active and "would free nothing" in stats.reason
        assert stats.freed_bytes == 0 and stats.calls["local"] == 1

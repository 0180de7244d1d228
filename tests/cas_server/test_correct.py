"""CaS computes the layer's formula: no further from float64 than the unpooled model, whatever is fused."""

from __future__ import annotations

import itertools

import pytest
import torch
from groups import error, exact, open_pool, rows_of, weights_of

import sidp
from launch import parallel_launch
from sidp import cas, cas_cpu
from sidp._native import C
from sidp.ffn import apply_formula

# Largest error, relative to the largest value, that an FFN of this size may have in each dtype: the last rounding (half
# a unit in the last place of values up to the largest), and a few float32 roundings before it.
BOUND = {torch.float32: 5e-6, torch.bfloat16: 2**-8 + 1e-5, torch.float16: 2**-11 + 1e-5}
# Mean square error over the unpooled model's own. Owners keep the intermediate in float32, an unpooled 16-bit model rounds
# it; in float32 both do the same arithmetic and differ by the luck of their last bits.
RATIO = {torch.float32: 1.02, torch.bfloat16: 0.9, torch.float16: 0.9}
ROWS = (1, 2, 3, 16, 127, 128, 129, 300)


def _variants() -> list[sidp.FFNSpec]:
    specs = []
    for dtype, activation in itertools.product(BOUND, ("silu", "gelu", "gelu_tanh", "gelu_new", "relu", "relu2")):
        for gated, bias in itertools.product((True, False), (True, False)):
            specs.append(sidp.FFNSpec(48, 112, activation, gated, bias, dtype))
    return specs


def _mean_square(y: torch.Tensor, reference: torch.Tensor) -> float:
    return ((y.double() - reference).square().mean() / reference.square().mean()).sqrt().item()


def _against_the_unpooled_model(ctx, placement: str):
    torch.set_num_threads(1)
    ratios = []
    specs = [sidp.FFNSpec(64, 176, s.activation, s.gated, s.bias, s.dtype) for s in _variants()]
    with open_pool(specs, mode="cas", placement=placement) as pool:
        for layer, spec in enumerate(specs):
            if pool.placement.local(layer, pool.rank):
                continue
            x = rows_of(spec, 300, seed=layer)
            reference = exact(x, spec, layer)
            unpooled = apply_formula(x, weights_of(spec, layer), spec)
            ours = sidp.ffn_forward(x, pool, layer)
            ratios.append((spec, _mean_square(ours, reference) / _mean_square(unpooled, reference)))
    return ratios


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_no_further_from_float64_than_the_unpooled_model(placement):
    measured = [pair for ratios in parallel_launch(_against_the_unpooled_model, 2, placement) for pair in ratios]
    assert len(measured) >= len(_variants())
    assert [(spec, ratio) for spec, ratio in measured if ratio > RATIO[spec.dtype]] == []


@pytest.mark.parametrize("dtype", list(BOUND))
def test_the_bound_does_not_grow_with_the_layer(dtype):
    """The server's computation by itself, at the size of a small model's layer."""
    spec = sidp.FFNSpec(1024, 4096, dtype=dtype)
    w, x = weights_of(spec, 0), rows_of(spec, 32)
    whole = {name: (w[name].data_ptr(), w[name].shape[1], False) for name in ("gate", "up", "down")}
    held = C.FfnSlice(spec.hidden_size, spec.intermediate_size, "silu", cas.dtype_name(dtype), **whole)
    wide, y = x.float(), torch.empty(x.shape, dtype=torch.float32)
    C.run_slice(held, C.open_blas(cas_cpu.blas_libraries()), wide.data_ptr(), x.shape[0], y.data_ptr())
    reference, ours, unpooled = exact(x, spec, 0), y.to(dtype), apply_formula(x, w, spec)
    assert error(ours, reference) <= BOUND[dtype]
    assert _mean_square(ours, reference) <= RATIO[dtype] * _mean_square(unpooled, reference)


def _every_variant(ctx, placement: str, mode: str):
    torch.set_num_threads(1)
    failures = []
    specs = _variants()
    with open_pool(specs, mode=mode, placement=placement) as pool:
        for layer, spec in enumerate(specs):
            x = rows_of(spec, ROWS[(layer + ctx.rank) % len(ROWS)], seed=layer)
            y = sidp.ffn_forward(x, pool, layer)
            assert y.dtype is x.dtype and y.shape == x.shape
            reference = exact(x, spec, layer)
            ours = error(y, reference)
            if pool.placement.local(layer, pool.rank):  # the model's own arithmetic
                bound = error(apply_formula(x, weights_of(spec, layer), spec), reference)
            else:
                bound = BOUND[spec.dtype]
            if not ours <= bound:
                failures.append((layer, spec, ours, bound))
        calls = pool.stats().calls
    return failures, calls


@pytest.mark.parametrize("placement", ["layer", "striped"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_formula_dtype_and_row_count_keeps_the_bound(world, placement):
    for failures, calls in parallel_launch(_every_variant, world, placement, "cas", timeout=120):
        assert not failures
        assert calls["was"] == 0 and calls["cas"] > 0
        assert (calls["local"] == 0) == (placement == "striped")


def test_a_group_of_one_computes_here():
    ((failures, calls),) = parallel_launch(_every_variant, 1, "layer", "cas", timeout=120)
    assert not failures
    assert calls["cas"] == 0 and calls["was"] == 0


def _all_row_counts(ctx, placement: str):
    spec = sidp.FFNSpec(32, 80, dtype=torch.float32, bias=True)
    specs = [spec] * 6
    wrong = []
    with open_pool(specs, mode="cas", placement=placement, slots=2) as pool:
        for rows in range(1 + ctx.rank, 301, 7):
            layer = rows % 6
            x = rows_of(spec, rows, seed=rows)
            y = sidp.ffn_forward(x, pool, layer)
            if error(y, exact(x, spec, layer)) > BOUND[torch.float32]:
                wrong.append(rows)
    return wrong


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_any_number_of_rows(placement):
    assert parallel_launch(_all_row_counts, 2, placement) == [[], []]


def _shapes(ctx, placement: str):
    spec = sidp.FFNSpec(24, 56, dtype=torch.float32)
    with open_pool([spec] * 6, mode="cas", placement=placement, slots=2) as pool:
        before = pool.stats().requests_sent
        empty = sidp.ffn_forward(torch.empty(0, 24), pool, (ctx.rank + 1) % 6)
        deep_empty = sidp.ffn_forward(torch.empty(2, 0, 24), pool, (ctx.rank + 1) % 6)
        nothing_sent = pool.stats().requests_sent == before
        results = []
        for layer in range(6):
            x = torch.randn(2, 3, 24)
            deep = sidp.ffn_forward(x, pool, layer)
            turned = sidp.ffn_forward(x.transpose(0, 1), pool, layer).transpose(0, 1)  # not contiguous
            one = sidp.ffn_forward(x[0, 0], pool, layer)
            results.append(
                deep.shape == x.shape
                and error(deep, exact(x, spec, layer)) < 5e-6
                and error(turned, exact(x, spec, layer)) < 5e-6
                and error(one, exact(x[0, 0], spec, layer)) < 5e-6
            )
        with pytest.raises(sidp.LayoutError):
            sidp.ffn_forward(torch.randn(1, 25), pool, 0)
    return tuple(empty.shape), tuple(deep_empty.shape), nothing_sent, all(results)


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_zero_rows_send_nothing_and_any_shape_is_kept(placement):
    assert parallel_launch(_shapes, 2, placement) == [((0, 24), (2, 0, 24), True, True)] * 2


def _narrow(ctx):
    # Three intermediate columns for four owners: one of them holds nothing and answers with zeros.
    spec = sidp.FFNSpec(16, 3, bias=True, dtype=torch.float32)
    with open_pool([spec] * 8, mode="cas", placement="striped", slots=2) as pool:
        x = rows_of(spec, 5)
        return max(error(sidp.ffn_forward(x, pool, layer), exact(x, spec, layer)) for layer in range(8))


def test_an_owner_without_a_share_answers_too():
    assert max(parallel_launch(_narrow, 4)) < 5e-6


def _fused_stats(ctx, placement: str):
    spec = sidp.FFNSpec(64, 4096, dtype=torch.float32)
    with open_pool([spec] * 8, mode="cas", placement=placement) as pool:
        x = rows_of(spec, 3 + 5 * ctx.rank, seed=ctx.rank)
        references = [exact(x, spec, layer) for layer in range(8)]
        worst, fused = 0.0, 0
        # Until this rank's server has fused something, which with everybody asking the same owners is soon.
        for step in range(2000):
            layer = step % 8
            worst = max(worst, error(sidp.ffn_forward(x, pool, layer), references[layer]))
            if step % 50 == 49 and (fused := pool.stats().fused_batches):
                break
        stats = pool.stats()
    return worst, fused, stats.batches <= stats.requests_served, stats.rows_served >= stats.requests_served


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_fused_results_keep_the_bound(placement):
    results = parallel_launch(_fused_stats, 3, placement, timeout=120)
    assert max(worst for worst, *_ in results) < BOUND[torch.float32]
    assert any(fused > 0 for _, fused, *_ in results)
    assert all(fewer and more for *_, fewer, more in results)

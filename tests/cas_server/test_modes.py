"""Ranks are independent: modes differ between ranks, change between iterations; idle and finished ranks serve."""

from __future__ import annotations

import pytest
import torch
from groups import error, exact, open_pool, rows_of, weights_of

import sidp
from launch import parallel_launch, start
from sidp.ffn import apply_formula

SPEC = sidp.FFNSpec(48, 96, dtype=torch.float32, bias=True)
SPECS = [SPEC] * 8


def _forward(pool, seed: int, rows: int = 4) -> tuple[bool, float]:
    """One iteration over all layers: whether all was bit-identical to the unpooled formula, and the worst error."""
    equal, worst = True, 0.0
    for layer, spec in enumerate(SPECS):
        x = rows_of(spec, rows, seed=seed * 100 + layer)
        y = sidp.ffn_forward(x, pool, layer)
        equal = equal and torch.equal(y, apply_formula(x, weights_of(spec, layer), spec))
        worst = max(worst, error(y, exact(x, spec, layer)))
    return equal, worst


def _mixed(ctx, placement: str):
    mode = ("was", "cas", "was")[ctx.rank]
    with open_pool(SPECS, mode=mode, placement=placement) as pool:
        results = [_forward(pool, seed) for seed in range(5)]
        calls = pool.stats().calls
    return mode, all(equal for equal, _ in results), max(worst for _, worst in results), calls


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_one_rank_in_was_beside_one_in_cas(placement):
    for mode, equal, worst, calls in parallel_launch(_mixed, 3, placement):
        assert worst < 5e-6
        assert calls["was" if mode == "cas" else "cas"] == 0
        assert equal or mode == "cas"


class _Alternating:
    """A policy that changes the mode every iteration."""

    reason, decisions = "this test alternates", ()

    def __init__(self, ring, first_cas: bool):
        self._ring, self._cas, self.switches = ring, not first_cas, 0

    def enter(self, layer: int, rows: int) -> bool:
        if layer == 0:
            self._cas = not self._cas
            self.switches += 1
            self._ring.pause() if self._cas else self._ring.resume()
        return self._cas

    def leave(self) -> None:
        pass


def _switching(ctx, placement: str):
    with open_pool(SPECS, mode="cas", placement=placement) as pool:
        pool._dispatch.chooser = _Alternating(pool._ring, first_cas=ctx.rank % 2 == 0)
        bad = []
        for seed in range(12):
            equal, worst = _forward(pool, seed)
            if worst >= 5e-6 or not (equal or pool._dispatch.chooser._cas):
                bad.append(seed)
        stats = pool.stats()
    return bad, stats.restarts, stats.calls["was"], stats.calls["cas"], stats.pauses


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_switching_every_iteration(placement):
    for bad, restarts, was, cas, pauses in parallel_launch(_switching, 3, placement):
        assert bad == []
        assert restarts == 0  # the prefetch goes on where it was paused
        assert was == cas > 0 and pauses >= 5


def _idle(ctx):
    with open_pool(SPECS, mode="cas") as pool:
        worst = max(_forward(pool, seed)[1] for seed in range(3)) if ctx.rank == 0 else 0.0
        ctx.say("done")
        ctx.hear("close")
        stats = pool.stats()
    return worst, stats.requests_sent, stats.requests_served


def test_idle_ranks_serve_and_send_nothing():
    with start(_idle, 4) as ranks:
        ranks.wait_for("done")
        ranks.tell("close")
        outcomes = [out.value for out in ranks.join()]
    assert outcomes[0][0] < 5e-6
    assert [sent for _, sent, _ in outcomes] == [18, 0, 0, 0]
    assert [served for *_, served in outcomes] == [0, 6, 6, 6]


def _finished(ctx, placement: str):
    pool = open_pool(SPECS, mode="cas", placement=placement)
    if ctx.rank > 0:
        ctx.say("closing")
        pool.close()  # returns when rank 0 has closed too; its server answers meanwhile
        return 0.0
    ctx.hear("go")
    worst = max(_forward(pool, seed)[1] for seed in range(5))
    pool.close()
    return worst


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_a_rank_that_has_finished_goes_on_serving(placement):
    with start(_finished, 3, placement) as ranks:
        ranks.wait_for("closing", [1, 2])
        ranks.tell("go")
        outcomes = ranks.join()
    assert [out.error for out in outcomes] == ["", "", ""]
    assert outcomes[0].value < 5e-6


def _fused_unit(transposed: bool) -> sidp.Unit:
    """gate and up in one tensor, as some models have them; `transposed`: [in, out], as GPT-2 has them."""
    h, i = SPEC.hidden_size, SPEC.intermediate_size
    if transposed:
        shapes = (("fc", (h, 2 * i), "cols", 2, "gate_up"), ("proj", (i, h), "rows", 1, "down"))
    else:
        shapes = (("fc", (2 * i, h), "rows", 2, "gate_up"), ("proj", (h, i), "cols", 1, "down"))
    tensors = [
        sidp.TensorSpec(n, shape, torch.float32, split, groups, role) for n, shape, split, groups, role in shapes
    ]
    tensors.append(sidp.TensorSpec("fc.bias", (2 * i,), torch.float32, "rows", 2, "gate_up_bias"))
    tensors.append(sidp.TensorSpec("proj.bias", (h,), torch.float32, role="down_bias"))
    return sidp.Unit(tuple(tensors), SPEC)


def _named_otherwise(ctx, placement: str, transposed: bool):
    unit = _fused_unit(transposed)
    config = sidp.PoolConfig(mode="cas", placement=placement, slots=2, timeout_s=20)
    with sidp.WeightPool([unit] * 6, config=config) as pool:
        for layer in range(6):
            w = weights_of(SPEC, layer)
            fc, proj = torch.cat([w["gate"], w["up"]]), w["down"]
            biases = {"fc.bias": torch.cat([w["gate_bias"], w["up_bias"]]), "proj.bias": w["down_bias"]}
            pool.load(layer, {"fc": fc.T if transposed else fc, "proj": proj.T if transposed else proj, **biases})
        pool.commit()
        worst = 0.0
        for layer in range(6):
            x = rows_of(SPEC, 5, seed=layer)
            y = pool.run(layer, x, lambda _, x=x, layer=layer: apply_formula(x, weights_of(SPEC, layer), SPEC))
            worst = max(worst, error(y, exact(x, SPEC, layer)))
        calls = pool.stats().calls
    return worst, calls["cas"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_fused_and_transposed_weights(placement, transposed):
    for worst, sent in parallel_launch(_named_otherwise, 2, placement, transposed):
        assert worst < 5e-6
        assert sent == (3 if placement == "layer" else 6)


def _without_formula(ctx):
    unit = sidp.Unit((sidp.TensorSpec("w", (8, 8), torch.float32, "rows"),))
    try:
        sidp.WeightPool([unit] * 4, config=sidp.PoolConfig(mode="cas", timeout_s=10))
    except sidp.ConfigError as refusal:
        return str(refusal)


def test_cas_needs_a_formula():
    assert all("formula" in text for text in parallel_launch(_without_formula, 2))

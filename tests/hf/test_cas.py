"""A pooled model in CaS: the owners compute by the formula that was found, unless somebody looks inside the FFN."""

from __future__ import annotations

import models
import pytest
import torch

from launch import parallel_launch
from sidp import PoolConfig, pool_model, unpool_model


def _count_runs(model) -> list[int]:
    """Hooks the last projection of every FFN; the list gets each one's layer as it runs."""
    ran: list[int] = []
    for ffn in model._sidp_pooled.ffns:
        ffn.projections[-1].module.register_forward_hook(lambda m, args, out, index=ffn.index: ran.append(index))
    return ran


def _in_cas(ctx, families: list[str], placement: str) -> list[dict]:
    seen = []
    for family in families:
        model = models.build(family)
        expected, bits = models.logits(model, ctx.rank), {k: v.clone() for k, v in model.state_dict().items()}
        with pool_model(model, config=PoolConfig(mode="cas", placement=placement, timeout_s=30, slots=1)) as pool:
            got = models.logits(model, ctx.rank)
            calls = dict(pool.stats().calls)
            ran = _count_runs(model)
            same = torch.equal(models.logits(model, ctx.rank), expected)
            hooked = pool.stats().calls["cas"] - calls["cas"]
            unpool_model(model)
            undone = all(torch.equal(v, bits[k]) for k, v in model.state_dict().items())
        error = ((got - expected).abs().max() / expected.abs().max()).item()
        seen.append(
            {"family": family, "error": error, "cas": calls["cas"], "hooked": hooked, "ran": ran, "same": same}
            | {"undone": undone}
        )
    return seen


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_cas_uses_the_formula_and_hooks_inside_still_run(placement):
    outcomes = parallel_launch(_in_cas, 2, ["llama", "phi3", "gpt2"], placement, timeout=120)
    for seen in (seen for values in outcomes for seen in values):
        assert seen["cas"] > 0 and seen["error"] < 1e-4, seen
        assert seen["hooked"] == 0 and seen["ran"] == [0, 1, 2, 3, 4], seen
        assert seen["same"] and seen["undone"], seen

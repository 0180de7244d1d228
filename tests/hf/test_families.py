"""Every family, pooled over 1 to 4 processes: the same bits as the unpooled model, through every way of generating."""

from __future__ import annotations

import dataclasses
import functools

import models
import pytest
import torch

import sidp
from launch import RankFailed, parallel_launch
from sidp import PoolConfig, pool_model, unpool_model

# placement, slots, dtype, and how the pooled model ends: undone before its pool closes, or closed with it
CASES = [
    ("layer", None, torch.bfloat16, "undo"),
    ("layer", 1, torch.float32, "close"),
    ("striped", None, torch.float32, "close"),
    ("striped", 1, torch.bfloat16, "undo"),
]


def _bits(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _instance_attributes(model) -> dict[str, set[str]]:
    return {name: set(module.__dict__) for name, module in model.named_modules()}


def _same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(actual, expected, strict=True)]


def _one_case(family: str, rank: int, placement: str, slots: int | None, dtype: torch.dtype, end: str) -> dict:
    model = models.build(family, dtype)
    everything = slots == 1 and placement == "layer"
    expected = models.answers(model, rank, everything)
    before = _bits(model), _instance_attributes(model), [p.requires_grad for p in model.parameters()]
    config = PoolConfig(placement=placement, slots=slots, timeout_s=30)
    with pool_model(model, config=config) as pool:
        seen = {
            "active": pool.active,
            "formula": pool.formula(0),
            "frozen": not any(p.requires_grad for p in model.parameters()),
            "same": _same(models.answers(model, rank, everything), expected),
            "again": torch.equal(models.logits(model, seed=rank), expected[0]),
            "stats": dataclasses.asdict(pool.stats()),
        }
        if end == "undo":
            unpool_model(model)
    if end == "undo":
        bits, attributes, trainable = before
        after = _bits(model)
        seen["undone"] = (
            set(after) == set(bits)
            and all(torch.equal(after[name], bits[name]) for name in bits)
            and _instance_attributes(model) == attributes
            and [p.requires_grad for p in model.parameters()] == trainable
            and torch.equal(models.logits(model, seed=rank), expected[0])
        )
    else:
        with pytest.raises(sidp.PoolClosedError, match="unpool_model"):
            model(**models.prompt(rank))
        seen["emptied"] = sum(p.numel() == 0 for p in model.parameters())
    return seen


def _all_families(ctx) -> dict[tuple[str, int], dict]:
    return {
        (family, number): _one_case(family, ctx.rank, *case)
        for family in models.FAMILIES
        for number, case in enumerate(CASES)
    }


@functools.cache
def _outcomes(world_size: int) -> list[dict] | RankFailed:
    """One group of processes a world size for all families, because importing transformers takes seconds."""
    try:
        return parallel_launch(_all_families, world_size, timeout=240)
    except RankFailed as error:
        return error


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_pooling_changes_no_bit(family, world_size):
    outcomes = _outcomes(world_size)
    if isinstance(outcomes, RankFailed):
        raise outcomes
    for rank, values in enumerate(outcomes):
        for number, (placement, slots, dtype, end) in enumerate(CASES):
            seen = values[family, number]
            what = f"rank {rank}, {placement}, slots={slots}, {dtype}"
            assert all(seen["same"]) and seen["again"], f"{what}: {seen}"
            assert seen["frozen"], what
            assert (seen["formula"] is None) == (family == "opt"), what
            if end == "undo":
                assert seen["undone"], what
            else:
                assert seen["emptied"] > 0, what
            if slots is not None and world_size > 1:  # an explicit number of slots is an explicit wish to pool
                assert seen["active"] and seen["stats"]["fetches"] > 0, what

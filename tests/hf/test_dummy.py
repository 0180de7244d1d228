"""Made-up weights: the same in a pool's shares and in a whole model, whatever the group and the placement."""

from __future__ import annotations

import models
import pytest
import torch
import transformers

from launch import parallel_launch
from sidp import ConfigError, PoolConfig, unpool_model
from sidp.hf.dummy import dummy_model, dummy_pretrained, made_up

FAMILIES = ["llama_bias_tied", "qwen3", "phi3", "opt"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: a folder that holds a config and nothing else}"""
    made = {}
    for family in FAMILIES:
        kind, fields = models.FAMILIES[family]
        folder = tmp_path_factory.mktemp(family)
        getattr(transformers, kind)(**fields).save_pretrained(folder)
        made[family] = str(folder)
    return made


def _compare(ctx, folders: list[str], placement: str) -> int:
    equal = 0
    for folder in folders:
        whole = dummy_model(folder, torch.float32, CPU, seed=5)
        expected = models.answers(whole, ctx.rank)
        config = PoolConfig(placement=placement, mode="was", slots=1, timeout_s=30, device="cpu")
        pool, model = dummy_pretrained(folder, torch.float32, config=config, seed=5)
        with pool:
            assert pool.active and pool.stats().fetches >= 0
            for a, b in zip(models.answers(model, ctx.rank), expected, strict=True):
                assert torch.equal(a, b)
                equal += 1
            unpool_model(model)
            weights = dict(model.named_parameters())
            assert all(torch.equal(weights[name], value) for name, value in whole.named_parameters())
    return equal


@pytest.mark.parametrize("placement, world_size", [("layer", 2), ("striped", 3)])
def test_a_pool_and_a_whole_model_have_the_same_weights(folders, placement, world_size):
    assert all(parallel_launch(_compare, world_size, list(folders.values()), placement))


def test_weights_depend_on_seed_name_and_shape_alone():
    def make(name="a.weight", seed=0, shape=(64, 32)):
        return made_up(name, shape, torch.float32, CPU, seed)

    state = torch.random.get_rng_state()
    assert torch.equal(make(), make())
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(make(), make(seed=1)) and not torch.equal(make(), make(name="b.weight"))
    assert abs(make(shape=(500, 400)).std() * 20 - 1) < 0.02  # 400 ** -0.5
    assert torch.equal(make("n.weight", shape=(5,)), torch.ones(5)) and not make("n.bias", shape=(5,)).any()


def test_a_name_of_sidp_plan_will_do_and_what_else_is_refused(tmp_path):
    from sidp.hf.dummy import model_config, skeleton

    assert model_config("Qwen3-14B").num_hidden_layers == 40
    assert model_config("meta-llama/Llama-3.1-8B-Instruct").intermediate_size == 14336
    with pytest.raises(ConfigError, match="neither a folder"):
        model_config("Qwen9-1B")
    (tmp_path / "config.json").write_text('{"model_type": "none such"}')
    with pytest.raises(ConfigError, match="cannot read its config"):
        skeleton(str(tmp_path), torch.float32)

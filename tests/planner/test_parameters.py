"""Parameter counts: the presets against the published totals, every family against the model transformers builds."""

import json
import sys
from pathlib import Path

import pytest

from sidp.errors import ConfigError
from sidp.planner.families import FAMILIES as KNOWN
from sidp.planner.families import shape_of
from sidp.planner.models import load_model

sys.path.insert(0, str(Path(__file__).parent.parent / "hf"))
import models as tiny  # the tiny configs of tests/hf

PUBLISHED = {  # the model cards' and checkpoints' totals
    "Qwen3-32B": (32_762_123_264, 32.76),
    "Llama-3.1-70B": (70_553_706_496, 70.55),
    "Qwen2.5-72B": (72_706_203_648, 72.71),
    "Llama-3.1-8B": (8_030_261_248, 8.03),
    "Qwen3-14B": (14_768_307_200, 14.77),
    "Qwen3-8B": (8_190_735_360, 8.19),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    exact, billions = PUBLISHED[name]
    model = load_model(name)
    assert model.parameters == exact
    assert round(model.parameters / 1e9, 2) == billions


def test_qwen3_32b_by_kind_as_worked_out_by_hand():
    kinds = load_model("qwen/qwen3-32b").by_kind()
    assert kinds["embeddings"] == kinds["lm_head"] == 151936 * 5120
    assert kinds["ffn"] == 64 * 3 * 5120 * 25600
    assert kinds["attention"] == 64 * (2 * 5120 * 64 * 128 + 2 * 5120 * 8 * 128)
    assert kinds["norms"] == 64 * (2 * 5120 + 2 * 128) + 5120


def test_llama_70b_on_one_gpu_of_four_and_its_kv_cache():
    model = load_model("Llama-3.1-70B-Instruct")
    assert model.kv_bytes_per_token() == 2 * 80 * 8 * 128 * 2 == 327_680
    assert model.kv_bytes_per_token(4) == 327_680 // 4
    assert model.kv_bytes_per_token(16) == 327_680 // 8  # a key/value head is not cut, but copied
    one_of_four = model.by_kind(4)
    assert one_of_four["ffn"] == 80 * 3 * 8192 * 28672 // 4
    assert one_of_four["norms"] == model.by_kind()["norms"]  # every GPU of a replica has them all
    assert one_of_four["embeddings"] == 128256 // 4 * 8192


def _meta_model(family):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    config = tiny.config_of(family)
    with torch.device("meta"):
        return config, transformers.AutoModelForCausalLM.from_config(config)


def _saved(config, folder):
    config.save_pretrained(folder)
    return load_model(str(folder))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_family_has_exactly_the_parameters_that_transformers_builds(family, tmp_path):
    config, model = _meta_model(family)
    assert _saved(config, tmp_path).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_units_take_the_bytes_of_the_units_that_pooling_finds(family, tmp_path):
    """Share for share, so that what is planned is what pool_model() makes."""
    from sidp._native import C
    from sidp.hf.recognize import find_ffns
    from sidp.shares import unit_layout

    config, model = _meta_model(family)
    model = model.to(_saved(config, tmp_path).dtype)
    found = [ffn.unit for ffn in find_ffns(model, allow_meta=True)]
    planned = load_model(str(tmp_path)).units()
    for kind in ("layer", "striped"):
        real = C.Placement(kind, [unit_layout(unit) for unit in found], 3)
        ours = C.Placement(kind, [unit_layout(unit) for unit in planned], 3)
        assert [ours.arena_bytes(r) for r in range(3)] == [real.arena_bytes(r) for r in range(3)]
        assert ours.largest_unit_bytes == real.largest_unit_bytes


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"enable_bias": False}),
        ("falcon", {"multi_query": False}),
        ("falcon_new", {"num_ln_in_parallel_attn": 1}),
        ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
        ("gpt2", {"n_inner": 40, "tie_word_embeddings": False}),
        ("starcoder2", {"use_bias": False}),
        ("nemotron", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"attention_bias": True, "head_dim": 12}),
        ("glm", {"attention_bias": False}),
        ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": True}),
    ],
)
def test_switches_of_a_config_are_followed(family, changes, tmp_path):
    import torch
    import transformers

    config = tiny.config_of(family)
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert _saved(config, tmp_path).parameters == sum(p.numel() for p in model.parameters())


def test_every_known_family_was_compared():
    seen = {tiny.config_of(family).model_type for family in tiny.FAMILIES}
    assert set(KNOWN) - seen == {"gemma"}  # Gemma 2 without the two extra norms


def test_unequal_layers_are_counted_one_by_one():
    config = {**_llama(), "intermediate_size": [64, 128, 64, 256]}
    model = shape_of(config, "unequal")
    assert model.by_kind()["ffn"] == 3 * 32 * (64 + 128 + 64 + 256)
    assert any("differ in size" in note for note in model.notes)


def _llama():
    return {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }


@pytest.mark.parametrize("family", tiny.REFUSED)
def test_what_cannot_be_pooled_is_refused_by_name(family):
    config = tiny.config_of(family)
    with pytest.raises(ConfigError, match=config.model_type):
        shape_of(json.loads(config.to_json_string()), family)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"vocab_size": None}, "no 'vocab_size'"),
        ({"intermediate_size": None}, "no 'intermediate_size'"),
        ({"model_type": None}, "no 'model_type'"),
        ({"model_type": "mamba"}, "unknown to sidp plan"),
        ({"model_type": "openelm"}, "differ"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer"),
        ({"hidden_size": "32"}, "got '32'"),
        ({"tie_word_embeddings": "no"}, "true or false"),
        ({"num_attention_heads": 5}, "no 'head_dim'"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"intermediate_size": [48, 48]}, "list of 2"),
        ({"intermediate_size": [48, 48, 48, 0]}, "integers of 1 or more"),
        ({"num_local_experts": 8}, "mixture of 8 experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"text_config": {}}, "multimodal"),
        ({"torch_dtype": "float8"}, "--dtype"),
    ],
)
def test_a_bad_config_is_named(changes, words):
    config = {key: value for key, value in {**_llama(), **changes}.items() if value is not None}
    with pytest.raises(ConfigError, match=words):
        shape_of(config, "tiny")


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="expected one of Qwen3-32B"):
        load_model("Qwen9-1T")
    with pytest.raises(ConfigError, match="expected one of"):
        load_model(str(tmp_path))  # a folder without config.json
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        load_model(str(broken))
    broken.write_text("[]")
    with pytest.raises(ConfigError, match="holds a list"):
        load_model(str(broken))


@pytest.mark.parametrize(
    ("changes", "tp", "words"),
    [
        ({}, 0, "1 or more"),
        ({}, 3, "does not divide the 4 attention heads"),
        ({"num_attention_heads": 6, "head_dim": 8, "num_key_value_heads": 3}, 2, "3 key/value heads"),
        ({"intermediate_size": 50}, 4, "intermediate size 50"),
    ],
)
def test_tensor_parallelism_that_does_not_divide_is_named(changes, tp, words):
    with pytest.raises(ConfigError, match=words):
        shape_of({**_llama(), **changes}, "tiny").check_tp(tp)

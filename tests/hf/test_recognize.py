"""What counts as an FFN, which formula it computes, and what is refused with which reason."""

from __future__ import annotations

import models
import pytest
import torch
import transformers
from torch import nn

from sidp import ConfigError, FFNSpec
from sidp.hf.recognize import find_ffns

FORMULAS = {  # family -> (activation, gated, bias)
    "llama": ("silu", True, False),
    "llama_bias_tied": ("silu", True, True),
    "gemma2": ("gelu_tanh", True, False),
    "phi3": ("silu", True, False),
    "gpt2": ("gelu_new", False, True),
    "gpt_neox": ("gelu", False, True),
    "falcon": ("gelu", False, False),
    "starcoder2": ("gelu_tanh", False, True),
    "nemotron": ("relu2", False, False),
}


def _formula(model: nn.Module) -> FFNSpec | None:
    return find_ffns(model)[0].unit.formula


@pytest.mark.parametrize("family", FORMULAS)
def test_the_formula_is_found_by_asking_the_module(family):
    found = find_ffns(models.build(family, torch.bfloat16))
    assert [f.index for f in found] == list(range(5))
    formula = found[-1].unit.formula
    assert (formula.activation, formula.gated, formula.bias) == FORMULAS[family]
    assert formula.dtype is torch.bfloat16


def test_names_shapes_and_splits_of_linear_fused_and_conv1d_weights():
    def units(family):
        found = find_ffns(models.build(family))[1]
        return {t.name: (t.shape, t.split, t.groups, found.roles[t.name]) for t in found.unit.tensors}

    assert units("llama") == {
        "gate_proj.weight": ((48, 32), "rows", 1, "gate"),
        "up_proj.weight": ((48, 32), "rows", 1, "up"),
        "down_proj.weight": ((32, 48), "cols", 1, "down"),
    }
    assert units("phi3") == {
        "gate_up_proj.weight": ((96, 32), "rows", 2, "gate_up"),
        "down_proj.weight": ((32, 48), "cols", 1, "down"),
    }
    assert units("gpt2") == {
        "c_fc.weight": ((32, 128), "cols", 1, "up"),
        "c_fc.bias": ((128,), "rows", 1, "up_bias"),
        "c_proj.weight": ((128, 32), "rows", 1, "down"),
        "c_proj.bias": ((32,), "none", 1, "down_bias"),
    }


def test_the_probe_works_on_the_meta_device_and_leaves_the_random_state_alone():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(models.config_of("llama"))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert find_ffns(model, allow_meta=True)[0].unit.formula is not None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", models.REFUSED)
def test_what_is_no_plain_ffn_is_refused_by_its_reason(family):
    with pytest.raises(ConfigError, match=models.REFUSED[family][2]):
        find_ffns(models.build(family))


class _Clamped(nn.Module):
    """A Llama MLP with a clamp far out, which small inputs do not reach."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = own.gate_proj, own.up_proj, own.down_proj

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x).clamp(-20, 20))


class _UpFirst(nn.Module):
    """A fused projection whose halves lie the other way round."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = own.gate_up_proj, own.down_proj

    def forward(self, x):
        up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)


@pytest.mark.parametrize("family,other", [("llama", _Clamped), ("phi3", _UpFirst)])
def test_a_module_that_computes_something_else_keeps_no_formula(family, other):
    model = models.build(family)
    layers = model.model.layers
    layers[2].mlp = other(layers[2].mlp)
    found = find_ffns(model)
    assert [f.unit.formula is None for f in found] == [False, False, True, False, False]
    assert "does not compute" in found[2].reason


def test_adapted_quantised_and_odd_projections_are_refused():
    model = models.build("llama")
    mlp = model.model.layers[1].mlp
    own = mlp.up_proj
    mlp.up_proj = nn.Sequential(own)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj is a Sequential.*merge_and_unload"):
        find_ffns(model)
    mlp.up_proj = own
    nn.utils.parametrizations.weight_norm(mlp.up_proj)
    with pytest.raises(ConfigError, match="parametrisation"):
        find_ffns(model)
    mlp.up_proj = nn.Linear(32, 44, bias=False)
    with pytest.raises(ConfigError, match=r"maps 32 -> 44, expected 32 -> 48"):
        find_ffns(model)
    mlp.up_proj = nn.Linear(32, 48, bias=False, dtype=torch.float64)
    with pytest.raises(ConfigError, match="float64"):
        find_ffns(model)


def test_a_quantised_model_is_refused():
    model = models.build("llama")
    model.config.quantization_config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ConfigError, match=r"quantised.*dequantise"):
        find_ffns(model)


def test_shared_parameters_are_refused():
    model = models.build("llama")
    layers = model.model.layers
    layers[3].mlp.down_proj.weight = layers[1].mlp.down_proj.weight
    with pytest.raises(ConfigError, match=r"layers\.3\.mlp\.down_proj\.weight and .*layers\.1.* share"):
        find_ffns(model)
    layers[3].mlp = layers[1].mlp
    with pytest.raises(ConfigError, match="share"):
        find_ffns(model)


def test_meta_weights_and_mixed_devices_are_refused():
    model = models.build("llama")
    mlp = model.model.layers[2].mlp
    mlp.down_proj.to_empty(device="meta")
    with pytest.raises(ConfigError, match=r"layers\.2\.mlp\.down_proj\.weight is on the meta device"):
        find_ffns(model)
    with pytest.raises(ConfigError, match="different devices"):
        find_ffns(model, allow_meta=True)


def test_accelerates_hooks_are_refused():
    hooks = pytest.importorskip("accelerate.hooks")
    model = models.build("llama")
    hooks.add_hook_to_module(model.model.layers[1].mlp, hooks.AlignDevicesHook(execution_device="cpu", offload=True))
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp.*accelerate"):
        find_ffns(model)


def test_a_layer_without_an_ffn_and_a_model_without_layers_are_refused():
    model = models.build("llama")
    model.model.layers[4].mlp = nn.Identity()
    with pytest.raises(ConfigError, match=r"layers\.4 .*no FFN"):
        find_ffns(model)
    with pytest.raises(ConfigError, match="no decoder layer"):
        find_ffns(nn.Linear(3, 3))


def test_only_the_decoder_of_a_composite_model_is_pooled():
    model = nn.Module()
    model.tower, model.text = models.build("qwen2"), models.build("llama")
    with pytest.raises(ConfigError, match="several stacks"):
        find_ffns(model)
    model.get_decoder = lambda: model.text.model
    assert [f.path for f in find_ffns(model)] == [f"text.model.layers.{i}.mlp" for i in range(5)]


def test_refused_types_are_told_by_their_config():
    model = models.build("llama")
    model.config.model_type = "gemma3n_text"
    with pytest.raises(ConfigError, match=r"gemma3n.*statistics"):
        find_ffns(model)

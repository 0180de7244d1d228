"""What a pooled model refuses, before anything has changed, and what keeps working."""

from __future__ import annotations

import copy
import io
import pickle

import models
import pytest
import torch

import sidp
from launch import parallel_launch
from sidp import PoolConfig, SidpError, pool_model, unpool_model


def _attempts(model, tmp) -> dict:
    layer = model.model.layers[1]
    return {
        "to a device": lambda: model.to("cpu"),
        "to a dtype": lambda: model.to(torch.float16),
        "half": model.half,
        "cuda": model.cuda,
        "half of the inner model": model.model.half,
        "half of a layer": layer.half,
        "half of an FFN": layer.mlp.half,
        "half of a projection": layer.mlp.up_proj.half,
        "share_memory": model.share_memory,
        "to_empty": lambda: model.to_empty(device="cpu"),
        "save_pretrained": lambda: model.save_pretrained(tmp),
        "state_dict": model.state_dict,
        "state_dict of a layer": layer.state_dict,
        "load_state_dict": lambda: model.load_state_dict({}),
        "deepcopy": lambda: copy.deepcopy(model),
        "deepcopy of a layer": lambda: copy.deepcopy(layer),
        "pickle": lambda: pickle.dumps(model),
        "torch.save": lambda: torch.save(model, io.BytesIO()),
        "train": model.train,
        "train of a layer": layer.train,
        "requires_grad_": model.requires_grad_,
        "pool_model": lambda: pool_model(model),
        "pool_model of a part": lambda: pool_model(model.model),
        "gradients": lambda: model(inputs_embeds=torch.randn(1, 3, 32, requires_grad=True)),
    }


def _peft_attempts(model) -> dict:
    peft = pytest.importorskip("peft")
    lora = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    everywhere = {"task_type": "CAUSAL_LM", "target_modules": ["up_proj", "down_proj"]}
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adaption = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2)
    return {
        "LoRA on attention": lambda: peft.get_peft_model(model, peft.LoraConfig(**lora)),
        "LoRA on FFNs": lambda: peft.get_peft_model(model, peft.LoraConfig(**everywhere)),
        "LoRA, mixed": lambda: peft.get_peft_model(model, peft.LoraConfig(**lora), mixed=True),
        "LoRA on the inner model": lambda: peft.get_peft_model(model.model, peft.LoraConfig(target_modules=["q_proj"])),
        "IA3": lambda: peft.get_peft_model(model, peft.IA3Config(**everywhere, feedforward_modules=["down_proj"])),
        "prompt tuning": lambda: peft.get_peft_model(model, prompt),
        "adaption prompt": lambda: peft.get_peft_model(model, adaption),
        "the tuner itself": lambda: peft.LoraModel(model, peft.LoraConfig(**lora), "default"),
        "injection into a layer": lambda: peft.inject_adapter_in_model(
            peft.LoraConfig(target_modules=["q_proj"]), model.model.layers[0]
        ),
        "add_adapter": lambda: model.add_adapter(peft.LoraConfig(**lora)),
        "load_adapter": lambda: model.load_adapter("nowhere"),
    }


def _snapshot(model):
    modules = {name: type(module) for name, module in model.named_modules()}
    params = {name: (p.dtype, p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    return modules, params


@pytest.fixture
def pooled():
    model = models.build("llama")
    with pool_model(model) as pool:
        yield model, pool


@pytest.mark.parametrize("attempts", [_attempts, _peft_attempts])
def test_what_would_read_or_move_the_weights_is_refused_and_changes_nothing(pooled, attempts, tmp_path):
    model, _ = pooled
    expected = models.logits(model, 1)
    snapshot = _snapshot(model)
    for what, attempt in (attempts(model, tmp_path) if attempts is _attempts else attempts(model)).items():
        with pytest.raises(SidpError, match="unpool_model"):
            attempt()
            pytest.fail(f"{what} was not refused")
        assert _snapshot(model) == snapshot, what
    assert not list(tmp_path.iterdir())
    assert not getattr(model, "_hf_peft_config_loaded", False)
    assert torch.equal(models.logits(model, 1), expected)


def test_after_the_undo_everything_is_allowed_again(pooled, tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = pooled
    expected = models.logits(model, 1)
    assert unpool_model(model) is model
    model.save_pretrained(tmp_path)
    assert torch.equal(models.logits(copy.deepcopy(model), 1), expected)
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(sidp.ConfigError, match="not pooled"):
        unpool_model(model)


def test_looking_at_the_model_works_as_before(pooled):
    model, _ = pooled
    assert "gate_proj" in repr(model) and model.config.model_type == "llama"
    assert model.eval() is model and model.requires_grad_(False) is model
    assert model.dtype is torch.float32 and model.device.type == "cpu"
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in models.build("llama").parameters())
    assert type(model).__name__ == "LlamaForCausalLM"


def test_a_model_in_training_mode_is_put_to_eval_and_back():
    model = models.build("gpt2").train()
    with pool_model(model):
        assert not any(module.training for module in model.modules())
        unpool_model(model)
    assert all(module.training for module in model.modules())


def test_a_model_with_gradients_is_refused():
    model = models.build("llama")
    model(**models.prompt(1)).logits.sum().backward()
    with pytest.raises(sidp.ConfigError, match=r"gate_proj\.weight has a gradient"):
        pool_model(model)


def _hooks_and_errors(ctx, family: str) -> None:
    model = models.build(family)
    expected = models.logits(model, 1)
    ffn, last = {
        "llama": (lambda layer: layer.mlp, "down_proj"),
        "opt": (lambda layer: layer, "fc2"),
    }[family]
    layers = model.get_decoder().layers
    calls: list[str] = []
    for index, layer in enumerate(layers):
        projection = getattr(ffn(layer), last)
        projection.register_forward_hook(lambda m, args, out, index=index: calls.append(f"{index}"))
    with pool_model(model, config=PoolConfig(slots=1, timeout_s=10)) as pool:
        assert torch.equal(models.logits(model, 1), expected)
        assert calls == [str(index) for index in range(len(layers))]
        for index, layer in enumerate(layers):  # an error anywhere inside must hand the slot back
            for place in ("act_fn" if family == "llama" else "activation_fn", last):
                owner = ffn(layer)
                broken = getattr(owner, place)
                handle = broken.register_forward_pre_hook(_fail)
                with pytest.raises(ZeroDivisionError):
                    models.logits(model, 1)
                handle.remove()
                assert torch.equal(models.logits(model, 1), expected), (index, place)
        assert pool.stats().fetches > 0


def _fail(module, args):
    raise ZeroDivisionError


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_hooks_inside_run_and_errors_inside_do_not_wedge_the_ring(family):
    parallel_launch(_hooks_and_errors, 2, family, timeout=120)


def _one_rank_cannot(ctx) -> str:
    model = models.build("mixtral" if ctx.rank == 1 else "llama")
    try:
        pool_model(model, config=PoolConfig(timeout_s=30))
    except sidp.ConfigError as error:
        models.logits(model, 1)
        return str(error)
    return "pooled"


def test_a_model_that_one_rank_cannot_pool_is_refused_on_all():
    first, second, third = parallel_launch(_one_rank_cannot, 3, timeout=120)
    assert "mixture of experts" in second and not second.startswith("rank")
    assert first.startswith("rank 1:") and third.startswith("rank 1:") and "mixture of experts" in first

"""What cannot be pooled, and why: raised while the model is looked at, before anything is changed."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ConfigError

if TYPE_CHECKING:
    from .recognize import FoundFFN, Projection

_REFUSED_TYPES = {
    "gemma3n": "its FFNs cut activations by their own statistics and its layers carry extra per-layer inputs",
    "bitnet": "its projections are ternary and packed when they are loaded",
}


def refuse_model(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    kinds = {str(getattr(c, "model_type", "")) for c in (config, getattr(config, "text_config", None)) if c is not None}
    for refused, why in _REFUSED_TYPES.items():
        if any(kind.startswith(refused) for kind in kinds):
            raise ConfigError(
                f"{type(model).__name__} (model_type {refused!r}) cannot be pooled: {why}. Run it unpooled."
            )
    quantised = getattr(model, "hf_quantizer", None) or getattr(config, "quantization_config", None)
    if quantised is not None:
        method = getattr(quantised, "quant_method", None) or type(quantised).__name__
        raise ConfigError(
            f"{type(model).__name__} is quantised ({method}); sidp pools float32, bfloat16 and float16 weights. "
            "Load it without quantisation (or dequantise it) first."
        )


def refuse_ffn(
    module: nn.Module, projections: tuple[Projection, ...], path: str, layer_path: str, bare: bool, allow_meta: bool
) -> None:
    if not bare:
        needed = [
            p.name
            for p in inspect.signature(module.forward).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        if len(needed) != 1:
            raise ConfigError(
                f"{path} ({type(module).__name__}) takes ({', '.join(needed)}), expected one tensor of hidden states: "
                "its FFN does more than an FFN, so it cannot be pooled. Run this model unpooled."
            )
    for name, child in module.named_modules():
        if getattr(child, "_hf_hook", None) is not None:
            raise ConfigError(
                f"{path}{'.' + name if name else ''} carries a hook of accelerate (device_map or offload), which moves "
                "its weights behind sidp's back. Load the model without device_map, or call "
                "accelerate.hooks.remove_hook_from_submodules(model) first."
            )
    for p in projections:
        for leaf, param in p.module._parameters.items():
            if param is not None and param.is_meta and not allow_meta:
                raise ConfigError(
                    f"{path}.{p.name}.{leaf} is on the meta device and has no values. Load the weights first, or use "
                    "sidp.from_pretrained."
                )


def refuse_shared(model: nn.Module, found: list[FoundFFN]) -> None:
    """Pooled memory may belong to one place only: neither a tied parameter nor another view of the same bytes."""
    owner: dict[Any, str] = {}
    pooled = {f"{f.path}.{spec.name}" for f in found for spec in f.unit.tensors}
    for name, param in model.named_parameters(remove_duplicate=False):
        key = id(param) if param.is_meta else (param.device, param.data_ptr())
        first = owner.setdefault(key, name)
        if first != name and param.numel() and (name in pooled or first in pooled):
            raise ConfigError(
                f"{name} and {first} share one parameter; a pooled FFN needs weights of its own. Clone one first."
            )


def refuse_mixed_devices(found: list[FoundFFN]) -> None:
    devices: dict[torch.device, str] = {}
    for f in found:
        for name, module, leaf in f.parameters():
            devices.setdefault(module._parameters[leaf].device, f"{f.path}.{name}")
    if len(devices) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ConfigError(f"the FFNs lie on different devices ({places}); move the whole model to one device first.")

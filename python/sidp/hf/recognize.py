"""Find the FFNs of a transformers model by structure: child names and shapes, one FFN per decoder layer.

What is found becomes one `Unit` a layer. What cannot be pooled is refused with a `ConfigError` that says why, before
anything is changed. Works on the meta device too, so that a loader can ask before it reads a byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..config import FFNSpec, TensorSpec, Unit
from ..errors import ConfigError
from .refusals import refuse_ffn, refuse_mixed_devices, refuse_model, refuse_shared

# Child names -> roles. The first row whose children are all there wins, so gated rows come before their plain subsets.
_PATTERNS: tuple[dict[str, str], ...] = (
    {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    {"gate_up_proj": "gate_up", "down_proj": "down"},
    {"w1": "gate", "w3": "up", "w2": "down"},
    {"wi_0": "gate", "wi_1": "up", "wo": "down"},
    {"c_fc_0": "gate", "c_fc_1": "up", "c_proj": "down"},
    {"input_linear": "gate_up", "output_linear": "down"},
    {"up_proj": "up", "down_proj": "down"},
    {"fc1": "up", "fc2": "down"},
    {"fc_in": "up", "fc_out": "down"},
    {"c_fc": "up", "c_proj": "down"},
    {"dense_h_to_4h": "up", "dense_4h_to_h": "down"},
    {"wi": "up", "wo": "down"},
    {"lin1": "up", "lin2": "down"},
)
_POOLED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Projection:
    """One linear map of an FFN. `transposed`: the weight lies [in, out] (Conv1D) instead of [out, in]."""

    name: str
    role: str  # "gate", "up", "gate_up" or "down"
    module: nn.Module
    transposed: bool

    @property
    def out_features(self) -> int:
        return int(self.module._parameters["weight"].shape[1 if self.transposed else 0])

    @property
    def in_features(self) -> int:
        return int(self.module._parameters["weight"].shape[0 if self.transposed else 1])


@dataclass(frozen=True)
class FoundFFN:
    """The FFN of decoder layer `index`. `module` is the FFN, or the decoder layer where the FFN has no module."""

    index: int
    path: str
    module: nn.Module
    layer_path: str
    layer: nn.Module
    projections: tuple[Projection, ...]
    unit: Unit
    roles: dict[str, str] = field(default_factory=dict)  # tensor name -> "gate", "up", "gate_up", "down", "down_bias"
    reason: str = ""  # why unit.formula is None

    @property
    def own_module(self) -> bool:
        return self.module is not self.layer

    def parameters(self) -> Iterator[tuple[str, nn.Module, str]]:
        """(tensor name in the unit, module that holds it, parameter name there), in the order of `unit.tensors`."""
        by_name = {p.name: p.module for p in self.projections}
        for spec in self.unit.tensors:
            child, _, leaf = spec.name.rpartition(".")
            yield spec.name, by_name[child], leaf


def find_ffns(model: nn.Module, *, allow_meta: bool = False) -> list[FoundFFN]:
    """The FFNs of `model`'s decoder, one a layer, ordered by layer.

    Raises ConfigError, naming the layer and the reason, where the model has none or one that cannot be pooled.
    `allow_meta`: parameters may lie on the meta device (a loader's skeleton).
    """
    refuse_model(model)
    list_path, layers = _decoder_layers(model)
    found: list[FoundFFN] = []
    probed: dict[Any, tuple[FFNSpec | None, str]] = {}
    for index, layer in enumerate(layers):
        layer_path = f"{list_path}.{index}" if list_path else str(index)
        name, module, pattern = _ffn_of_layer(layer, layer_path)
        path = f"{layer_path}.{name}" if name else layer_path
        projections = _projections(module, pattern, path)
        refuse_ffn(module, projections, path, layer_path, name == "", allow_meta)
        tensors, roles = _tensor_specs(projections)
        key = (type(module), tensors, tuple(sorted(roles.items())), _plain_attributes(module))
        if key not in probed:
            probed[key] = _formula(module, projections, tensors, own_module=name != "")
        formula, reason = probed[key]
        unit = Unit(tensors=tensors, formula=formula)
        found.append(FoundFFN(index, path, module, layer_path, layer, projections, unit, roles, reason))
    refuse_shared(model, found)
    refuse_mixed_devices(found)
    return found


def _decoder_layers(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The one outermost ModuleList of the decoder whose elements hold FFNs, and its path in `model`."""
    decoder = model
    if callable(getattr(model, "get_decoder", None)):
        decoder = model.get_decoder() or model
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    lists: list[tuple[str, list[nn.Module]]] = []
    for name, module in decoder.named_modules():
        path = ".".join(part for part in (prefix, name) if part)
        if not isinstance(module, nn.ModuleList) or any(path.startswith(outer + ".") for outer, _ in lists):
            continue
        layers = list(module)
        if any(_moe_inside(layer) or next(_candidates(layer), None) for layer in layers):
            lists.append((path, layers))
    if len(lists) == 1:
        return lists[0]
    if not lists:
        raise ConfigError(
            f"{type(model).__name__}: no decoder layer holds an FFN that sidp recognises (expected linear children "
            "such as gate_proj/up_proj/down_proj, fc1/fc2, c_fc/c_proj). Run it unpooled."
        )
    raise ConfigError(
        f"{type(model).__name__}: several stacks of layers hold FFNs ({', '.join(path for path, _ in lists)}); "
        "pass the one to pool (for instance model.language_model) to pool_model."
    )


def _ffn_of_layer(layer: nn.Module, layer_path: str) -> tuple[str, nn.Module, dict[str, str]]:
    moe = _moe_inside(layer)
    if moe:
        raise ConfigError(
            f"{layer_path}.{moe[0]} ({type(moe[1]).__name__}) is a mixture of experts behind a router; experts are not "
            "pooled yet. Run this model unpooled."
        )
    found = list(_candidates(layer))
    if len(found) == 1:
        return found[0]
    if not found:
        children = ", ".join(name for name, _ in layer.named_children())
        raise ConfigError(
            f"{layer_path} ({type(layer).__name__}; children {children}) has no FFN that sidp recognises, though other "
            "layers have one. Pooling takes one FFN for every layer: run this model unpooled."
        )
    names = ", ".join(name or type(layer).__name__ for name, _, _ in found)
    raise ConfigError(f"{layer_path} has {len(found)} FFNs ({names}); sidp pools one a layer. Run this model unpooled.")


def _moe_inside(layer: nn.Module) -> tuple[str, nn.Module] | None:
    for name, module in layer.named_modules():
        names = set(module._modules) | set(module._parameters)
        if "experts" in names or (names & {"router", "gate"} and names & {"moe", "expert_w1", "experts_gate_up_proj"}):
            return name or "(layer)", module
        if any(p is not None and p.dim() == 3 for key, p in module._parameters.items() if key.endswith("proj")):
            return name or "(layer)", module
    return None


def _candidates(layer: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, str]]]:
    for name, module in layer.named_modules():
        for pattern in _PATTERNS:
            if all(module._modules.get(child) is not None for child in pattern):
                yield name, module, pattern
                break


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _projections(module: nn.Module, pattern: dict[str, str], path: str) -> tuple[Projection, ...]:
    found = []
    for name, role in pattern.items():
        child = module._modules[name]
        weight = child._parameters.get("weight")
        plain = type(weight) is nn.Parameter and type(weight.data) is torch.Tensor and weight.dim() == 2
        if not _is_linear(child) or not plain:
            raise ConfigError(
                f"{path}.{name} is a {type(child).__name__}, expected a plain nn.Linear or Conv1D with its own weight. "
                "Quantised, sharded, adapted or parametrised projections cannot be pooled: dequantise, merge adapters "
                "(merge_and_unload) or remove the parametrisation first."
            )
        extra = set(dict(child.named_parameters())) - {"weight", "bias"} | set(dict(child.named_buffers()))
        if extra or not {weight.dtype} <= set(_POOLED_DTYPES):
            what = f"holds {', '.join(sorted(extra))} besides weight and bias" if extra else f"is {weight.dtype}"
            raise ConfigError(f"{path}.{name} {what}; sidp pools plain float32, bfloat16 and float16 projections.")
        found.append(Projection(name, role, child, transposed=not isinstance(child, nn.Linear)))
    _check_shapes(found, path)
    return tuple(found)


def _check_shapes(projections: list[Projection], path: str) -> None:
    roles = {p.role: p for p in projections}
    down = roles["down"]
    hidden, inner = down.out_features, down.in_features
    for role, p in roles.items():
        expected = (hidden, inner) if role == "down" else (inner * (2 if role == "gate_up" else 1), hidden)
        if (p.out_features, p.in_features) != expected:
            raise ConfigError(
                f"{path}.{p.name} maps {p.in_features} -> {p.out_features}, expected {expected[1]} -> {expected[0]} "
                f"beside {down.name} ({inner} -> {hidden}); this is no FFN that sidp can pool."
            )


def _tensor_specs(projections: tuple[Projection, ...]) -> tuple[tuple[TensorSpec, ...], dict[str, str]]:
    specs, roles = [], {}
    for p in projections:
        groups = 2 if p.role == "gate_up" else 1
        inner_is_out = p.role != "down"
        for leaf, param in p.module._parameters.items():
            if param is None:
                continue
            name = f"{p.name}.{leaf}"
            split = "rows" if inner_is_out != p.transposed else "cols"
            if leaf == "bias":
                split = "rows" if inner_is_out else "none"
            roles[name] = p.role if leaf == "weight" else f"{p.role}_bias"
            specs.append(TensorSpec(name, tuple(param.shape), param.dtype, split, groups, roles[name]))
    return tuple(specs), roles


def _plain_attributes(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Numbers and words the module carries (limits, multipliers): layers that differ in them are probed apart."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str)) and not k.startswith("_")}
    plain.pop("layer_idx", None)
    return (*sorted(plain.items()), *((n, type(m)) for n, m in module.named_children()))


def _formula(
    module: nn.Module, projections: tuple[Projection, ...], tensors: tuple[TensorSpec, ...], *, own_module: bool
) -> tuple[FFNSpec | None, str]:
    from .probe import probe_formula

    if not own_module:
        return None, "the FFN lies in the decoder layer and has no module of its own"
    if len({spec.dtype for spec in tensors}) != 1:
        return None, "the FFN's tensors have different dtypes"
    return probe_formula(module, projections)

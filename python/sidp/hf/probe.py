"""Ask an FFN module, numerically, whether it computes the formula of `FFNSpec`.

The module itself is asked, but through a small double of it: the same class and attributes with its projections shrunk
to a few random float64 rows. That works on the meta device, costs no memory, leaves the global random state alone, and
tells activations apart that agree to three digits (gelu and its tanh form). A module that clamps, scales or normalises
does not match at one of the input sizes tried and stays without a formula.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..config import FFNSpec

if TYPE_CHECKING:
    from .recognize import Projection

_HIDDEN, _INNER = 12, 20
_SCALES = (0.3, 3.0, 60.0)  # the largest finds clamps
_TOLERANCE = 1e-6  # far under the gap between gelu and its tanh form, far over float64's rounding

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def probe_formula(module: nn.Module, projections: tuple[Projection, ...]) -> tuple[FFNSpec | None, str]:
    """(the FFNSpec that `module` computes, "") or (None, the reason why CaS is not offered)."""
    roles = {p.role: p for p in projections}
    biases = {p.module._parameters.get("bias") is not None for p in projections}
    if len(biases) != 1:
        return None, "only some of its projections have a bias"
    try:
        double = _shrink(module, projections)
        errors = {name: _error(double, projections, act) for name, act in _ACTIVATIONS.items()}
    except Exception as error:  # the module's own code, on sizes it may not expect: any failure means "unknown"
        return None, f"its forward could not be probed ({type(error).__name__}: {error})"
    name = min(errors, key=lambda key: errors[key])
    if not errors[name] <= _TOLERANCE:
        return None, f"it does not compute activation(gate) * up -> down (nearest: {name}, off by {errors[name]:.1e})"
    if name == "gelu_tanh" and any(type(m).__name__ == "NewGELUActivation" for m in module.modules()):
        name = "gelu_new"
    down = roles["down"]
    return (
        FFNSpec(
            hidden_size=down.out_features,
            intermediate_size=down.in_features,
            activation=name,
            gated="gate" in roles or "gate_up" in roles,
            bias=biases.pop(),
            dtype=down.module._parameters["weight"].dtype,
        ),
        "",
    )


def _shrink(module: nn.Module, projections: tuple[Projection, ...]) -> nn.Module:
    generator = torch.Generator("cpu").manual_seed(0)
    small = {p.name: _small_projection(p, generator) for p in projections}
    double = _shallow(module)
    for name, child in module._modules.items():
        double._modules[name] = small[name] if name in small else copy.deepcopy(child)
    double.__dict__.pop("forward", None)
    return double.eval()


def _shallow(module: nn.Module) -> nn.Module:
    """A copy that shares attributes but has module and parameter tables of its own, and no hooks."""
    double = module.__class__.__new__(module.__class__)
    double.__dict__.update(module.__dict__)
    for key, value in module.__dict__.items():
        if key.endswith("_hooks") or key.startswith("_forward_hooks") or key.startswith("_forward_pre_hooks"):
            double.__dict__[key] = type(value)()
    double.__dict__["_modules"] = dict(module._modules)
    double.__dict__["_parameters"] = dict(module._parameters)
    return double


def _small_projection(p: Projection, generator: torch.Generator) -> nn.Module:
    sizes = {"down": (_HIDDEN, _INNER), "gate_up": (2 * _INNER, _HIDDEN)}
    out_features, in_features = sizes.get(p.role, (_INNER, _HIDDEN))
    shape = (in_features, out_features) if p.transposed else (out_features, in_features)
    double = _shallow(p.module)
    double.__dict__.pop("forward", None)
    for leaf, param in p.module._parameters.items():
        if param is not None:
            size = shape if leaf == "weight" else (out_features,)
            value = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu") / in_features**0.5
            double._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    names = ("nx", "nf") if p.transposed else ("in_features", "out_features")
    double.__dict__.update(zip(names, (in_features, out_features), strict=True))
    return double


@torch.no_grad()
def _error(
    double: nn.Module, projections: tuple[Projection, ...], act: Callable[[torch.Tensor], torch.Tensor]
) -> float:
    """The largest difference from the formula over all input sizes, relative to the formula's largest value."""
    generator = torch.Generator("cpu").manual_seed(1)
    worst = 0.0
    for scale in _SCALES:
        x = scale * torch.randn(2, 5, _HIDDEN, generator=generator, dtype=torch.float64, device="cpu")
        expected = _apply_formula(x, double, projections, act)
        actual = double(x)
        if not isinstance(actual, torch.Tensor) or actual.shape != expected.shape:
            raise ValueError(f"it returns {type(actual).__name__}, not one tensor of the input's shape")
        worst = max(worst, ((actual.double() - expected).abs().max() / expected.abs().max()).item())
    return worst


def _apply_formula(
    x: torch.Tensor, double: nn.Module, projections: tuple[Projection, ...], act: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    def linear(p: Projection, y: torch.Tensor) -> torch.Tensor:
        params = double._modules[p.name]._parameters
        weight = params["weight"].T if p.transposed else params["weight"]
        return F.linear(y, weight, params.get("bias"))

    roles = {p.role: p for p in projections}
    if "gate_up" in roles:
        gate, up = linear(roles["gate_up"], x).chunk(2, dim=-1)
        inner = act(gate) * up
    elif "gate" in roles:
        inner = act(linear(roles["gate"], x)) * linear(roles["up"], x)
    else:
        inner = act(linear(roles["up"], x))
    return linear(roles["down"], inner)

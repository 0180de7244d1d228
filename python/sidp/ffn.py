"""The FFN of the formula in FFNSpec, over a pool."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .config import FFNSpec
from .errors import ConfigError, LayoutError


def _gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


ACTIVATION_FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def apply_formula(x: torch.Tensor, weights: dict[str, torch.Tensor], spec: FFNSpec) -> torch.Tensor:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where the FFN is plain. x [..., H] -> [..., H]."""
    get = weights.get
    act = ACTIVATION_FUNCTIONS[spec.activation]
    up = F.linear(x, weights["up"], get("up_bias"))
    inner = act(F.linear(x, weights["gate"], get("gate_bias"))) * up if spec.gated else act(up)
    return F.linear(inner, weights["down"], get("down_bias"))


def ffn_forward(x: torch.Tensor, pool, layer: int) -> torch.Tensor:
    """The FFN of ``layer`` on ``x``.

    Args:
        x: [..., H] in the layer's dtype, on the pool's device.
        pool: a committed WeightPool.
        layer: 0 ... len(specs) - 1. Layers in ascending order, forward after forward, are the fast order; any order works.

    Returns:
        [..., H], x's dtype and device. In WaS bit-identical to the same formula on unpooled weights.

    Raises:
        LayoutError: x has another width, dtype or device than the layer's weights.
        ConfigError: no such layer, or a layer whose formula is not known.
        PeerError: a rank of the group died or does not answer.
        PoolClosedError: the pool is closed.
    """
    if torch.compiler.is_compiling():
        return torch.ops.sidp.ffn(x, pool.handle, layer)
    spec = pool.formula(layer)
    if spec is None:
        raise ConfigError(
            f"layer {layer} was given as a Unit without a formula: call its own module between "
            f"pool.acquire({layer}) and pool.release({layer})"
        )
    if x.shape[-1:] != (spec.hidden_size,) or x.dtype is not spec.dtype or x.device != pool.device:
        raise LayoutError(
            f"x is {tuple(x.shape)} {x.dtype} on {x.device}, but layer {layer} takes "
            f"[..., {spec.hidden_size}] {spec.dtype} on {pool.device}: convert x first"
        )
    return pool.run(layer, x, lambda weights: apply_formula(x, weights, spec))

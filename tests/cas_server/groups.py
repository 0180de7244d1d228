"""What the CaS tests share: weights, a pool over them, and the float64 answer."""

from __future__ import annotations

import torch

import sidp
from sidp._native import C
from sidp.ffn import ACTIVATION_FUNCTIONS


def weights_of(spec: sidp.FFNSpec, layer: int) -> dict[str, torch.Tensor]:
    """The layer's weights, the same in every process."""
    generator = torch.Generator().manual_seed(1000 + layer)
    made = {}
    for tensor in spec.unit().tensors:
        scale = 0.3 if tensor.name.endswith("bias") else tensor.shape[-1] ** -0.5
        made[tensor.name] = (torch.randn(tensor.shape, generator=generator) * scale).to(tensor.dtype)
    return made


def open_pool(specs: list[sidp.FFNSpec], **config) -> sidp.WeightPool:
    config.setdefault("timeout_s", 20.0)
    pool = sidp.WeightPool(specs, config=sidp.PoolConfig(**config))
    for layer, spec in enumerate(specs):
        if pool.owns(layer):
            pool.load(layer, weights_of(spec, layer))
    pool.commit()
    return pool


def rows_of(spec: sidp.FFNSpec, rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, spec.hidden_size, generator=generator).to(spec.dtype)


def exact(x: torch.Tensor, spec: sidp.FFNSpec, layer: int) -> torch.Tensor:
    """The formula in float64."""
    w = {name: tensor.double() for name, tensor in weights_of(spec, layer).items()}
    return formula(x.double(), w, spec)


def formula(x: torch.Tensor, w: dict[str, torch.Tensor], spec: sidp.FFNSpec) -> torch.Tensor:
    linear = torch.nn.functional.linear
    act = ACTIVATION_FUNCTIONS[spec.activation]
    up = linear(x, w["up"], w.get("up_bias"))
    inner = act(linear(x, w["gate"], w.get("gate_bias"))) * up if spec.gated else act(up)
    return linear(inner, w["down"], w.get("down_bias"))


def error(y: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest error relative to the largest value of the reference."""
    return ((y.double() - reference).abs().max() / reference.abs().max()).item()


def policy_model(link: float = 1e9, compute=((1, 1e-3), (64, 2e-3), (128, 4e-3))) -> C.PolicyModel:
    """Eight layers whose fetches take long enough for CaS to pay at few rows."""
    model = C.PolicyModel()
    model.layers, model.remote_layers = 8, 6
    model.fetch_bytes, model.link_bytes_per_s = 60e6, link  # 60 ms at 1 GB/s
    model.round_trip_s, model.row_bytes = 1e-4, 1e3
    model.compute = C.TimeTable(list(compute))
    return model

"""What a model weighs, from its config alone: parameters by kind, and one FFN unit per layer."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import TensorSpec, Unit
from ..errors import ConfigError

KINDS = ("embeddings", "attention", "norms", "ffn", "lm_head")


@dataclass(frozen=True)
class Weight:
    """`count` tensors of [rows, cols] outside the FFNs, and how tensor parallelism lays them out.

    `split`: "none", every GPU of a replica holds all of it; "rows", each holds 1/TP of the rows (rounded up);
    "kv", rows are key/value heads, of which every GPU holds at least one.
    """

    kind: str
    rows: int
    cols: int = 1
    split: str = "none"
    count: int = 1

    def parameters(self, tp: int = 1) -> int:
        """On one GPU of a replica of `tp` GPUs."""
        rows = self.rows
        if self.split == "rows":
            rows = -(-rows // tp)
        elif self.split == "kv":
            rows = max(1, rows // tp)
        return self.count * rows * self.cols


@dataclass(frozen=True)
class FFN:
    """One layer's FFN as the engine lays it out. `fused`: gate and up are one [2 * inner, hidden] tensor; `transposed`:
    weights lie [in, out]."""

    hidden: int
    inner: int
    gated: bool = True
    bias: bool = False
    fused: bool = False
    transposed: bool = False

    def unit(self, dtype: torch.dtype, tp: int = 1) -> Unit:
        """The pool's unit of one GPU: its 1/TP of the intermediate dimension; the output bias whole."""
        hidden, inner = self.hidden, self.inner // tp
        blocks = (("gate_up", 2),) if self.fused else tuple((n, 1) for n in ("gate", "up") if self.gated or n == "up")
        first, second = ("cols", "rows") if self.transposed else ("rows", "cols")

        def matrix(name: str, out: int, inputs: int, split: str, groups: int) -> TensorSpec:
            return TensorSpec(name, (inputs, out) if self.transposed else (out, inputs), dtype, split, groups)

        tensors = []
        for name, groups in blocks:
            tensors.append(matrix(name, groups * inner, hidden, first, groups))
            if self.bias:
                tensors.append(TensorSpec(f"{name}_bias", (groups * inner,), dtype, "rows", groups))
        tensors.append(matrix("down", hidden, inner, second, 1))
        if self.bias:
            tensors.append(TensorSpec("down_bias", (hidden,), dtype))
        return Unit(tuple(tensors))

    def parameters(self, tp: int = 1) -> int:
        """On one GPU of a replica of `tp` GPUs."""
        inner = self.inner // tp
        up = 2 if self.gated else 1
        return (up + 1) * self.hidden * inner + (up * inner + self.hidden if self.bias else 0)


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes. `weights` is everything but the FFNs; `ffns` has one a layer."""

    name: str
    model_type: str
    dtype: torch.dtype
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    weights: tuple[Weight, ...]
    ffns: tuple[FFN, ...]
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        return len(self.ffns)

    def by_kind(self, tp: int = 1) -> dict[str, int]:
        """Parameters on one GPU of a replica of `tp` GPUs."""
        sums = Counter(dict.fromkeys(KINDS, 0))
        for weight in self.weights:
            sums[weight.kind] += weight.parameters(tp)
        sums["ffn"] = sum(ffn.parameters(tp) for ffn in self.ffns)
        return dict(sums)

    @property
    def parameters(self) -> int:
        return sum(self.by_kind().values())

    def other_bytes(self, tp: int = 1) -> int:
        """Bytes of all weights but the FFNs, on one GPU."""
        return sum(weight.parameters(tp) for weight in self.weights) * self.dtype.itemsize

    def units(self, tp: int = 1) -> list[Unit]:
        """What one GPU gives to its pool, layer by layer."""
        return [ffn.unit(self.dtype, tp) for ffn in self.ffns]

    def kv_bytes_per_token(self, tp: int = 1) -> int:
        """On one GPU: keys and values of its heads in every layer."""
        heads = max(1, self.kv_heads // tp)
        return 2 * self.layers * heads * self.head_dim * self.dtype.itemsize

    def check_tp(self, tp: int) -> None:
        """ConfigError where `tp` GPUs cannot share the heads and the FFNs evenly."""
        if tp < 1:
            raise ConfigError(f"tp must be 1 or more, got {tp}")
        if self.heads % tp:
            raise ConfigError(
                f"tp={tp} does not divide the {self.heads} attention heads of {self.name}: take a divisor of them"
            )
        if self.kv_heads % tp and tp % self.kv_heads:
            raise ConfigError(
                f"tp={tp} and the {self.kv_heads} key/value heads of {self.name} do not divide each other: take a "
                f"divisor or a multiple of {self.kv_heads}"
            )
        odd = [layer for layer, ffn in enumerate(self.ffns) if ffn.inner % tp]
        if odd:
            raise ConfigError(
                f"tp={tp} does not divide the FFN's intermediate size {self.ffns[odd[0]].inner} of {self.name} (layer "
                f"{odd[0]}): take a divisor of it"
            )


def load_model(name: str, dtype: str | None = None) -> ModelShape:
    """A preset's name, a config.json, or a folder that holds one.

    Args:
        dtype: of weights and KV cache; None takes the config's.

    Raises:
        ConfigError: no such model, a config without a needed field, or a model that sidp does not pool.
    """
    from .families import shape_of
    from .presets import PRESETS, preset

    known = preset(name)
    if known is not None:
        return shape_of(known, known["_name"], dtype)
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"--model is {name!r}, expected one of {', '.join(PRESETS)}, a config.json, or a folder that holds one"
        )
    return shape_of(_read(file), _title(file), dtype)


def _title(file: Path) -> str:
    return file.resolve().parent.name if file.name == "config.json" else file.stem


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON ({error}); give a model's config.json") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds a {type(config).__name__}, expected the JSON object of a model's config")
    return config

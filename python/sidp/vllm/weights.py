"""Where a checkpoint holds the FFN of each layer, and how a tensor-parallel rank's part of it is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..config import TensorSpec, Unit
from ..errors import ConfigError, LayoutError
from ..hf.checkpoint import Checkpoint
from ..hf.pooling import release_host_memory
from ..pool import WeightPool
from ..shares import Index

_FFN_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.(weight|bias)$")
_PARTS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


class FFNTensors:
    """The FFN tensors of ``checkpoint``, by layer; everything else is ``rest``.

    Args:
        tp_rank, tp_size: which shard of each tensor is this rank's.
    """

    def __init__(self, checkpoint: Checkpoint, tp_rank: int, tp_size: int) -> None:
        self._checkpoint = checkpoint
        self._tp_rank, self._tp_size = tp_rank, tp_size
        self._keys: dict[tuple[int, str, str], str] = {}
        every_key = checkpoint.keys()
        for key in every_key:
            found = _FFN_KEY.search(key)
            if found is None:
                continue
            place = (int(found[1]), found[2], found[3])
            if place in self._keys:
                raise ConfigError(
                    f"{checkpoint.folder} has both {self._keys[place]} and {key}: which is layer {place[0]}'s?"
                )
            self._keys[place] = key
        if not self._keys:
            raise ConfigError(
                f"{checkpoint.folder} has no tensor named ...layers.N.mlp.(gate|up|down)_proj.weight: load_format='sidp' "
                "reads checkpoints in Hugging Face's naming"
            )

    def rest(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of everything that is no FFN tensor, read one at a time."""
        ffn, every_key = set(self._keys.values()), self._checkpoint.keys()
        for key in every_key:
            if key not in ffn:
                yield key, self._checkpoint.read(key, (slice(None),) * len(self._checkpoint.shape(key)))

    def check(self, units: Sequence[Unit]) -> None:
        """Raises ConfigError for a missing layer or tensor, LayoutError for a shape that is not the model's."""
        layers = {layer for layer, _, _ in self._keys}
        if layers != set(range(len(units))):
            odd = sorted(layers ^ set(range(len(units))))
            raise ConfigError(
                f"{self._checkpoint.folder}: the model has {len(units)} layers, and of {odd[:8]} only one of both knows"
            )
        for layer, unit in enumerate(units):
            for spec in unit.tensors:
                for key, shape in self._expected(layer, spec):
                    if self._checkpoint.shape(key) != shape:
                        raise LayoutError(
                            f"{self._checkpoint.file_of(key)}: {key} has shape {self._checkpoint.shape(key)}, the model "
                            f"expects {shape}"
                        )

    def load_share(self, pool: WeightPool) -> None:
        """Reads into ``pool`` what this rank keeps, and nothing else."""
        for layer, unit in enumerate(pool.units):
            for spec in unit.tensors:
                for index in pool.wants(layer, spec.name):
                    pool.load_slice(layer, spec.name, index, self._read(layer, spec, index).to(spec.dtype))
            if pool.owns(layer):
                release_host_memory()  # malloc would keep some of the parts just read

    def _read(self, layer: int, spec: TensorSpec, index: Index) -> torch.Tensor:
        """The part ``index`` of this rank's shard of a tensor, which may lie in two tensors of the checkpoint."""
        name, kind, _ = _names(spec)
        keys = [self._key(layer, part, kind) for part in _PARTS[name]]
        if name == "down":
            if kind == "weight":
                first = self._tp_rank * spec.shape[1]
                return self._checkpoint.read(keys[0], (index[0], _moved(index[1], first)))
            # The engine adds this bias on the first tensor-parallel rank only, and so does CaS.
            bias = self._checkpoint.read(keys[0], index)
            return bias if self._tp_rank == 0 else torch.zeros_like(bias)
        rows, own = spec.shape[0] // 2, []
        for number, key in enumerate(keys):
            start, stop = max(index[0].start, number * rows), min(index[0].stop, (number + 1) * rows)
            if start < stop:
                part = _moved(slice(start, stop), (self._tp_rank - number) * rows)
                own.append(self._checkpoint.read(key, (part, *index[1:])))
        return own[0] if len(own) == 1 else torch.cat(own)

    def _expected(self, layer: int, spec: TensorSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
        name, kind, parts = _names(spec)
        for part in parts:
            shape = list(spec.shape)
            if name == "gate_up":
                shape[0] = shape[0] // 2 * self._tp_size
            elif kind == "weight":
                shape[1] *= self._tp_size
            yield self._key(layer, part, kind), tuple(shape)

    def _key(self, layer: int, part: str, kind: str) -> str:
        try:
            return self._keys[layer, part, kind]
        except KeyError:
            raise ConfigError(
                f"{self._checkpoint.folder} has no {part}.{kind} of layer {layer}: use a complete checkpoint"
            ) from None


def _names(spec: TensorSpec) -> tuple[str, str, tuple[str, ...]]:
    """("gate_up" or "down", "weight" or "bias", the checkpoint's names of its parts)."""
    name = spec.name.removesuffix("_bias")
    return name, "bias" if spec.name != name else "weight", _PARTS[name]


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def require_loaded(model: Any, loaded: set[str] | None, pooled: set[str]) -> None:
    """ConfigError naming parameters of ``model`` that neither vLLM has loaded nor the pool holds."""
    if loaded is None:
        return  # this model does not say what it loads
    missing = sorted(name for name, _ in model.named_parameters() if name not in loaded and name not in pooled)
    if missing:
        raise ConfigError(
            f"the checkpoint lacks {len(missing)} tensors of {type(model).__name__}: {', '.join(missing[:4])}"
        )

"""What a rank keeps of each unit, and the loading of it: names, shapes and index ranges instead of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ._native import C
from .config import TensorSpec, Unit
from .errors import ConfigError, LayoutError
from .memory import view
from .spill import SplitMemory, part_of

Index = tuple[slice, ...]


def unit_layout(unit: Unit):
    """The native layout of a unit: matrices stay, vectors are [n, 1], more dimensions are folded into columns."""
    tensors = []
    for spec in unit.tensors:
        rows, cols = spec.shape[0], 1
        for n in spec.shape[1:]:
            cols *= n
        tensors.append(C.TensorLayout(spec.name, rows, cols, spec.dtype.itemsize, spec.split, spec.groups))
    return C.UnitLayout(tensors)


def _index(piece, spec: TensorSpec) -> Index:
    if len(spec.shape) == 2:
        return slice(piece.row, piece.row + piece.rows), slice(piece.col, piece.col + piece.cols)
    return (slice(piece.row, piece.row + piece.rows),)


class Shares:
    """This rank's extents of every unit, in ``memory`` (its extent area), filled by ``load``.

    Args:
        units: all layers.
        placement: the native placement.
        rank: whose shares.
        memory: uint8 tensor of ``placement.arena_bytes(rank)`` bytes, or the same in two parts.
    """

    def __init__(self, units: Sequence[Unit], placement, rank: int, memory: torch.Tensor | SplitMemory):
        self.units = units
        self.memory = memory
        self._extents = [placement.share(layer, rank) for layer in range(len(units))]
        self._missing = [set(range(len(extent.pieces))) for extent in self._extents]
        self._loaded_whole: set[tuple[int, str]] = set()

    def wants(self, layer: int, name: str) -> list[Index]:
        position, spec = self._find(layer, name)
        return [_index(piece, spec) for piece in self._extents[layer].pieces if piece.tensor == position]

    def load(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        expected = [spec.name for spec in self.units[layer].tensors]
        missing = [name for name in expected if name not in tensors]
        unknown = [name for name in tensors if name not in expected]
        if missing or unknown:
            raise LayoutError(
                f"layer {layer} takes the tensors {expected}; missing: {missing or 'none'}, unknown: {unknown or 'none'}"
            )
        for name in expected:
            self._check(layer, name, tensors[name])
        for name in expected:
            self.load_tensor(layer, name, tensors[name])

    def load_tensor(self, layer: int, name: str, tensor: torch.Tensor) -> None:
        self._check(layer, name, tensor)
        self._loaded_whole.add((layer, name))
        for index in self.wants(layer, name):
            self.load_slice(layer, name, index, tensor[index])

    def load_slice(self, layer: int, name: str, index: Index, tensor: torch.Tensor) -> None:
        position, spec = self._find(layer, name)
        extent = self._extents[layer]
        number = self._number_of(layer, position, spec, index)
        if number is None:
            raise ConfigError(
                f"this rank keeps {self.wants(layer, name)} of '{name}' in layer {layer}, not {index}: load what wants() names"
            )
        if number not in self._missing[layer]:
            raise ConfigError(f"'{name}' {index} of layer {layer} was loaded already: load each tensor once")
        shape = tuple(part.stop - part.start for part in index) + spec.shape[len(index) :]
        if tuple(tensor.shape) != shape or tensor.dtype is not spec.dtype:
            raise LayoutError(
                f"'{name}' {index} of layer {layer} must be {shape} {spec.dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
        memory, base = part_of(self.memory, extent.offset)
        view(memory, base + extent.pieces[number].offset, shape, spec.dtype).copy_(tensor)
        self._missing[layer].discard(number)

    def _number_of(self, layer: int, position: int, spec: TensorSpec, index: Index) -> int | None:
        for number, piece in enumerate(self._extents[layer].pieces):
            if piece.tensor == position and _index(piece, spec) == tuple(index):
                return number
        return None

    def whole_unit(self, layer: int) -> dict[str, torch.Tensor]:
        """Views of a unit that lies here whole."""
        return unit_views(
            self.units[layer], self._extents[layer].pieces, *part_of(self.memory, self._extents[layer].offset)
        )

    def check_complete(self) -> None:
        """ConfigError naming what this rank keeps and was never loaded."""
        gaps = {}
        for layer, missing in enumerate(self._missing):
            pieces = self._extents[layer].pieces
            if missing:
                gaps[layer] = sorted({self.units[layer].tensors[pieces[number].tensor].name for number in missing})
        if gaps:
            listing = "; ".join(f"layer {layer}: {', '.join(names)}" for layer, names in list(gaps.items())[:4])
            more = f" and {len(gaps) - 4} layers more" if len(gaps) > 4 else ""
            raise ConfigError(
                f"commit() before everything was loaded: {listing}{more}; call load() for each layer first"
            )

    def _find(self, layer: int, name: str) -> tuple[int, TensorSpec]:
        for position, spec in enumerate(self.units[layer].tensors):
            if spec.name == name:
                return position, spec
        raise LayoutError(
            f"layer {layer} has no tensor '{name}': expected one of {[spec.name for spec in self.units[layer].tensors]}"
        )

    def _check(self, layer: int, name: str, tensor: torch.Tensor) -> None:
        _, spec = self._find(layer, name)
        if not isinstance(tensor, torch.Tensor):
            raise LayoutError(f"'{name}' of layer {layer} must be a torch.Tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != spec.shape or tensor.dtype is not spec.dtype:
            raise LayoutError(
                f"'{name}' of layer {layer} must be {spec.shape} {spec.dtype}, got {tuple(tensor.shape)} {tensor.dtype}: "
                f"Linear layout is [out, in]; convert before loading"
            )
        if tensor.device.type == "meta":
            raise LayoutError(f"'{name}' of layer {layer} is on the meta device and has no bytes: materialise it first")
        if (layer, name) in self._loaded_whole:
            raise ConfigError(f"'{name}' of layer {layer} was loaded already: load each layer once")


def pieces_of(unit: Unit, extent) -> list[tuple[str, Index, tuple[int, ...], torch.dtype, int]]:
    """(tensor, index range, shape, dtype, offset in the extent) of every piece of an extent of ``unit``."""
    found = []
    for piece in extent.pieces:
        spec = unit.tensors[piece.tensor]
        index = _index(piece, spec)
        shape = tuple(part.stop - part.start for part in index) + spec.shape[len(index) :]
        found.append((spec.name, index, shape, spec.dtype, piece.offset))
    return found


def unit_views(unit: Unit, pieces, memory: torch.Tensor, base: int) -> dict[str, torch.Tensor]:
    """Views of a whole unit (one piece a tensor, in order) that begins at ``base`` of ``memory``."""
    return {
        spec.name: view(memory, base + piece.offset, spec.shape, spec.dtype)
        for spec, piece in zip(unit.tensors, pieces, strict=True)
    }

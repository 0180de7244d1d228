"""Compute as a service, what both backends share: which layers it reaches, where their matrices lie, how large mailboxes are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ._native import C
from .config import FFNSpec, TensorSpec, Unit
from .errors import ConfigError

_SLOTS = 2  # requests of one (owner, requester) pair in flight
_MAX_ROWS, _LEAST_ROWS = 128, 8  # of one request; more rows travel in pieces
_REGION_BYTES = 32 << 20  # what a rank's mailboxes may take before requests get shorter
_CUDA_REGION_BYTES = 128 << 20  # there a shorter request reads the weights once more
_ROLES = ("gate", "up", "gate_up", "down")
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_MATRICES = ("gate", "up", "down")


def dtype_name(dtype: torch.dtype) -> str:
    return _DTYPE_NAMES[dtype]


def roles(unit: Unit) -> dict[str, int] | None:
    """Positions of a unit's tensors by role ("gate", "up", "gate_up", "down", and each with "_bias").

    None where CaS cannot serve the unit: no formula, roles that do not make up its FFN, or mixed dtypes.
    """
    spec = unit.formula
    if spec is None or any(tensor.dtype is not spec.dtype for tensor in unit.tensors):
        return None
    found = {tensor.role or tensor.name: position for position, tensor in enumerate(unit.tensors)}
    weights = {role for role in _ROLES if role in found}
    if weights not in ([{"gate", "up", "down"}, {"gate_up", "down"}] if spec.gated else [{"up", "down"}]):
        return None
    biases = set(found) - weights
    if not biases <= {f"{role}_bias" for role in weights}:
        return None
    if any(unit.tensors[found[role]].split == "none" for role in weights):
        return None
    return found


def reachable(units: Sequence[Unit], cuda: bool = False) -> list[bool]:
    """By layer, whether CaS can serve it.

    The CUDA server takes bfloat16 or float16 matrices in Linear layout, of one hidden size and dtype: where layers differ, those
    of the kind that most of them have.
    """
    served = [roles(unit) is not None for unit in units]
    if not cuda:
        return served
    served = [here and _in_linear_layout(unit) for here, unit in zip(served, units, strict=True)]
    kinds = Counter(_kind(unit.formula) for here, unit in zip(served, units, strict=True) if here)
    common = kinds.most_common(1)[0][0] if kinds else None
    return [here and _kind(unit.formula) == common for here, unit in zip(served, units, strict=True)]


def _kind(spec: FFNSpec) -> tuple[int, torch.dtype]:
    return spec.hidden_size, spec.dtype


def _in_linear_layout(unit: Unit) -> bool:
    splits = {(tensor.role or tensor.name): tensor.split for tensor in unit.tensors}
    linear = all(splits[role] == ("cols" if role == "down" else "rows") for role in _ROLES if role in splits)
    return linear and unit.formula.dtype in (torch.bfloat16, torch.float16)


def geometry(units: Sequence[Unit], world_size: int, striped: bool, cuda: bool = False):
    """The layout of every rank's mailbox region; the same on all ranks. ConfigError where CaS can serve no layer."""
    served = reachable(units, cuda)
    specs = [unit.formula for unit, here in zip(units, served, strict=True) if here]
    if not specs:
        kinds = " (on GPUs: bfloat16 or float16, weights [out, in])" if cuda else ""
        raise ConfigError(
            f"mode='cas' needs layers whose formula is known{kinds}, and this pool has none: give FFNSpecs, or use mode='was'"
        )
    row = max(spec.hidden_size * spec.dtype.itemsize for spec in specs)
    reply = max(spec.hidden_size * (4 if striped else spec.dtype.itemsize) for spec in specs)
    fit = (_CUDA_REGION_BYTES if cuda else _REGION_BYTES) // (world_size * _SLOTS * (row + reply))
    return C.CasGeometry(world_size, _SLOTS, max(_LEAST_ROWS, min(_MAX_ROWS, fit)), row, reply)


@dataclass(frozen=True)
class Slice:
    """What one rank holds of a layer.

    Args:
        hidden, inner: sizes; inner 0 where the rank holds nothing.
        activation, dtype: of the formula.
        matrices: by role "gate", "up", "down": (address, pitch in elements, transposed); address 0 where there is none.
        biases: by role "gate_bias", ...: addresses.
    """

    hidden: int = 0
    inner: int = 0
    activation: str = "silu"
    dtype: torch.dtype = torch.float32
    matrices: dict[str, tuple[int, int, bool]] = field(default_factory=lambda: dict.fromkeys(_MATRICES, (0, 0, False)))
    biases: dict[str, int] = field(default_factory=dict)


def slices_of(units: Sequence[Unit], served: Sequence[bool], placement, rank: int, address: int) -> list[Slice]:
    """By layer what ``rank``, whose extents begin at ``address``, serves."""
    return [
        _slice(unit, placement.share(layer, rank), address)
        if served[layer] and not placement.resident(layer) and placement.owner(layer) in (-1, rank)
        else Slice()
        for layer, unit in enumerate(units)
    ]


def _slice(unit: Unit, share, address: int) -> Slice:
    found = roles(unit)
    pieces: dict[int, list] = {}
    for piece in share.pieces:
        pieces.setdefault(piece.tensor, []).append(piece)
    down = pieces.get(found["down"], [])
    transposed = unit.tensors[found["down"]].split == "rows"
    inner = 0 if not down else down[0].rows if transposed else down[0].cols
    spec = unit.formula
    piece_of = Slice(spec.hidden_size, inner, spec.activation, spec.dtype)
    for role, position in found.items():
        target = piece_of.biases if role.endswith("_bias") else piece_of.matrices
        target.update(_parts(role, unit.tensors[position], pieces.get(position, []), inner, address + share.offset))
    return piece_of


def _parts(role: str, tensor: TensorSpec, pieces: list, inner: int, base: int) -> dict:
    """One tensor's pieces as the server takes them: matrices (address, pitch, transposed), or biases' addresses."""
    bias = role.endswith("_bias")
    names = [f"{name}_bias" for name in ("gate", "up")] if role == "gate_up_bias" else [role]
    names = ["gate", "up"] if role == "gate_up" else names
    if not pieces:
        return {}
    transposed = tensor.split == ("rows" if role == "down" else "cols")
    result = {}
    for number, name in enumerate(names):
        # A fused tensor is one piece that holds both parts, or a piece for each.
        piece = pieces[number] if len(pieces) == len(names) else pieces[0]
        address = base + piece.offset
        if len(pieces) < len(names) and number > 0:
            step = inner if bias or transposed else inner * piece.cols
            address += step * tensor.dtype.itemsize
        result[name] = address if bias else (address, piece.cols, transposed)
    return result

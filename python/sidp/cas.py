"""Compute as a service on the CPU: which layers it reaches, the server over this rank's share, and the requester."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from ._native import C
from .config import TensorSpec, Unit
from .errors import ConfigError

_SLOTS = 2  # requests of one (owner, requester) pair in flight
_MAX_ROWS, _LEAST_ROWS = 128, 8  # of one request; more rows travel in pieces
_REGION_BYTES = 32 << 20  # what a rank's mailboxes may take before requests get shorter
_ROLES = ("gate", "up", "gate_up", "down")
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


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


def reachable(units: Sequence[Unit]) -> list[bool]:
    """By layer, whether CaS can serve it."""
    return [roles(unit) is not None for unit in units]


def geometry(units: Sequence[Unit], world_size: int, striped: bool):
    """The layout of every rank's mailbox region; the same on all ranks. ConfigError where CaS can serve no layer."""
    specs = [unit.formula for unit in units if roles(unit) is not None]
    if not specs:
        raise ConfigError(
            "mode='cas' needs layers whose formula is known, and this pool has none: give FFNSpecs, or use mode='was'"
        )
    row = max(spec.hidden_size * spec.dtype.itemsize for spec in specs)
    reply = max(spec.hidden_size * (4 if striped else spec.dtype.itemsize) for spec in specs)
    fit = _REGION_BYTES // (world_size * _SLOTS * (row + reply))
    return C.CasGeometry(world_size, _SLOTS, max(_LEAST_ROWS, min(_MAX_ROWS, fit)), row, reply)


def blas_libraries() -> list[str]:
    """Where to look for a BLAS: SIDP_BLAS, torch's own library, numpy's, the package scipy-openblas32."""
    wish = os.environ.get("SIDP_BLAS")
    if wish:
        return [wish]
    found = [Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"]
    found += sorted((Path(torch.__file__).parent.parent / "torch.libs").glob("*openblas*.so*"))
    for package, folder in (("numpy", "../numpy.libs"), ("scipy_openblas32", "lib")):
        spec = sys.modules[package].__spec__ if package in sys.modules else find_spec(package)
        if spec is not None and spec.origin:
            found += sorted((Path(spec.origin).parent / folder).glob("*openblas*.so*"))
    return [str(path) for path in found if path.exists()]


def server_threads(world_size: int) -> int:
    """Threads of the server's BLAS: SIDP_CPU_SERVER_THREADS, else cores / ranks, at most torch's own."""
    text = os.environ.get("SIDP_CPU_SERVER_THREADS")
    if text is not None:
        if not text.isdigit() or int(text) < 1:
            raise ConfigError(
                f"environment variable SIDP_CPU_SERVER_THREADS={text!r}: expected an integer of 1 or more"
            )
        return int(text)
    cores = len(os.sched_getaffinity(0))
    return max(1, min(torch.get_num_threads(), cores // world_size))


class _Slices:
    """Addresses of the matrices within one rank's extents."""

    def __init__(self, placement, rank: int, address: int):
        self._placement, self._rank, self._address = placement, rank, address

    def slice(self, unit: Unit, layer: int):
        found = roles(unit)
        share = self._placement.share(layer, self._rank)
        if found is None or self._placement.resident(layer) or not self._serves(layer):
            return C.FfnSlice()
        base = self._address + share.offset
        pieces: dict[int, list] = {}
        for piece in share.pieces:
            pieces.setdefault(piece.tensor, []).append(piece)
        down = pieces.get(found["down"], [])
        transposed = unit.tensors[found["down"]].split == "rows"
        inner = 0 if not down else down[0].rows if transposed else down[0].cols
        parts = {"gate": (0, 0, False), "up": (0, 0, False), "down": (0, 0, False)}
        biases = {}
        for role, position in found.items():
            target = biases if role.endswith("_bias") else parts
            target.update(_parts(role, unit.tensors[position], pieces.get(position, []), inner, base))
        spec = unit.formula
        return C.FfnSlice(spec.hidden_size, inner, spec.activation, dtype_name(spec.dtype), **parts, **biases)

    def _serves(self, layer: int) -> bool:
        return self._placement.owner(layer) in (-1, self._rank)


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


class CpuCas:
    """This rank's server and requester over the mailbox regions of a committed transport.

    Args:
        units, placement, rank: of the pool. striped: whether the placement is "striped".
        regions: addresses of every rank's mailbox region, by rank.
        extents: address of this rank's extent area.
        watch: the native PeerWatch.
        blas: a native Blas.
        settings: "pool_id", "activity", "link_bytes_per_s", "phases", "keep" for the requester and the server.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        placement,
        rank: int,
        geometry,
        striped: bool,
        regions,
        extents,
        watch,
        blas,
        settings,
    ):
        world = len(regions)
        slices = _Slices(placement, rank, extents)
        self.slices = [slices.slice(unit, layer) for layer, unit in enumerate(units)]
        self.reaches = [
            roles(unit) is not None and not placement.local(layer, rank) for layer, unit in enumerate(units)
        ]
        common = {
            "rank": rank,
            "geometry": geometry,
            "pool_id": settings["pool_id"],
            "striped": striped,
            "regions": regions,
            "watch": watch,
            "keep": settings["keep"],
        }
        remote = [
            C.RemoteLayer(unit.formula.hidden_size, dtype_name(unit.formula.dtype), placement.owner(layer))
            if self.reaches[layer]
            else C.RemoteLayer()
            for layer, unit in enumerate(units)
        ]
        self._requester = C.CasRequester(
            layers=remote,
            activity=settings["activity"],
            phases=settings["phases"],
            link_bytes_per_s=settings["link_bytes_per_s"],
            **common,
        )
        self._server = C.CasServer(
            layers=self.slices,
            blas=blas,
            blas_threads=server_threads(world),
            fuse=os.environ.get("SIDP_CAS_FUSE", "1") != "0",
            **common,
        )

    def forward(self, layer: int, x: torch.Tensor, timeout_s: float) -> torch.Tensor:
        """The FFN of ``layer`` on x [..., H], computed by the layer's owners. [..., H], x's dtype.

        Raises:
            PeerError: an owner died or did not answer in time.
        """
        rows = x.numel() // x.shape[-1]
        x = x.detach().contiguous()
        y = torch.empty_like(x)
        ticket = self._requester.submit(layer, x.data_ptr(), y.data_ptr(), rows, timeout_s)
        self._requester.finish(ticket, timeout_s)
        return y

    def stop(self) -> None:
        """Ends the server; requests are answered no more."""
        self._server.stop()

    def server_stats(self):
        return self._server.stats()

    def requester_stats(self):
        return self._requester.stats()

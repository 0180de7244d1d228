"""Compute as a service on GPUs: the persistent kernel over this rank's share, and the requester."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ._native import C
from .cas import Slice, dtype_name, reachable, slices_of
from .config import Unit
from .transport_cuda import device_bytes


@dataclass(frozen=True)
class Sent:
    """What ``PoolStats.add_cas`` reads of a requester."""

    requests: int
    rows: int
    fused_rows: int
    wait_seconds: float


@dataclass(frozen=True)
class Served:
    """What ``PoolStats.add_cas`` reads of a server; of the launches that have ended."""

    requests: int
    rows: int
    batches: int
    fused_batches: int
    refused: int
    broken: int
    retired: int
    busy_seconds: float
    launches: int


class CudaCas:
    """This rank's server and requester over the mailbox regions of a connected CudaTransport.

    Args:
        units, placement, rank: of the pool. striped: whether the placement is "striped".
        local: by layer, whether this rank reads it where it lies and never asks for it.
        sms: of the server; None takes the measured default, less where ranks share the GPU.
        ranks_here: how many ranks compute on this GPU.
        timeout_s: after which a wait on the device gives up.
        arguments: of ``CudaTransport.cas_arguments()``.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        placement,
        rank: int,
        geometry,
        striped: bool,
        local,
        sms,
        ranks_here: int,
        timeout_s: float,
        arguments: dict,
    ):
        served = reachable(units, cuda=True)
        self.device: torch.device = arguments["device"]
        self.slices = slices_of(units, served, placement, rank, arguments["extents"])
        self.reaches = [here and not local[layer] for layer, here in enumerate(served)]
        spec = units[served.index(True)].formula
        _load_blas(self.device, spec.dtype)
        self._native = C.CudaCas(
            device=self.device.index,
            rank=rank,
            geometry=geometry,
            pool_id=arguments["pool_id"],
            striped=striped,
            regions=arguments["regions"],
            bells=arguments["bells"],
            own_bells=arguments["own_bells"],
            hidden=spec.hidden_size,
            dtype=dtype_name(spec.dtype),
            owners=[
                placement.owner(layer) if reached and not striped else -1 for layer, reached in enumerate(self.reaches)
            ],
            units=[_native_unit(layer, here) for layer, here in enumerate(self.slices) if here.inner],
            sms=sms or 0,
            ranks_here=ranks_here,
            timeout_s=timeout_s,
            watch=arguments["watch"],
            activity=arguments["activity"],
            keep=arguments["keep"],
        )
        self.memory_bytes = geometry.bytes + self._native.workspace_bytes

    def forward(self, layer: int, x: torch.Tensor, timeout_s: float) -> torch.Tensor:
        """The FFN of ``layer`` on x [..., H], computed by the layer's owners, in stream order. [..., H], x's dtype.

        A wait that fails fills the result with NaN; the error is raised by the next call, by ``check`` or at the end.
        """
        x = x.detach().contiguous()
        y = torch.empty_like(x)
        rows = x.numel() // x.shape[-1]
        if rows:
            self._native.forward(layer, x.data_ptr(), y.data_ptr(), rows, self._stream())
        return y

    def forward_here(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """``forward`` by this rank's own server, for a layer that it serves: in striped its partial sum."""
        y = torch.empty_like(x)
        self._native.forward_here(layer, x.data_ptr(), y.data_ptr(), x.shape[0], self._stream())
        return y

    def _stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.device.index)

    def weights_here(self, layer: int) -> dict[str, torch.Tensor]:
        """Views of what this rank serves of ``layer``: "gate", "up" [inner, H], "down" [H, inner], and biases."""
        here = self.slices[layer]
        wide = {"down": (here.hidden, here.inner), "down_bias": (here.hidden,)}
        addresses = {role: matrix[0] for role, matrix in here.matrices.items()} | here.biases
        views = {}
        for role, address in addresses.items():
            if not address:
                continue
            shape = wide.get(role, (here.inner,) if role.endswith("_bias") else (here.inner, here.hidden))
            nbytes = here.dtype.itemsize * torch.Size(shape).numel()
            views[role] = device_bytes(address, nbytes, self._native, self.device).view(here.dtype).view(shape)
        return views

    def check(self) -> None:
        """Raises what the device has found: PeerError, LayoutError, SidpError."""
        self._native.check()

    def stop(self) -> None:
        """Ends the server; requests are answered no more."""
        self._native.stop()

    def requester_stats(self) -> Sent:
        c = self._native.requester_counters()
        return Sent(c.requests, c.rows, c.batch_rows, c.service_seconds)

    def server_stats(self) -> Served:
        c = self._native.server_counters()
        retired = self._native.retired.bit_count()
        return Served(c.requests, c.rows, c.batches, c.fused_batches, c.refused, 0, retired, c.busy_seconds, c.launches)


def _load_blas(device: torch.device, dtype: torch.dtype) -> None:
    """Has torch load its BLAS before a server runs: each kernel that is loaded later waits for the launches that are queued."""
    for kind in (dtype, torch.float32):
        x = torch.ones(16, 16, device=device, dtype=kind)
        torch.nn.functional.linear(x, x)
    torch.cuda.synchronize(device)


def _native_unit(layer: int, here: Slice):
    for role, columns in (("gate", here.hidden), ("up", here.hidden), ("down", here.inner)):
        address, pitch, transposed = here.matrices[role]
        assert not address or (pitch == columns and not transposed), f"{role} of layer {layer} is not packed"
    matrices = {role: matrix[0] for role, matrix in here.matrices.items()}
    return C.CudaCasUnit(layer, here.hidden, here.inner, here.activation, **matrices, **here.biases)

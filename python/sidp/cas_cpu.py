"""Compute as a service on the CPU: the server over this rank's share, the requester, and the BLAS they use."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from ._native import C
from .cas import Slice, dtype_name, reachable, slices_of
from .config import Unit
from .errors import ConfigError


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


def _native_slice(here: Slice):
    return C.FfnSlice(here.hidden, here.inner, here.activation, dtype_name(here.dtype), **here.matrices, **here.biases)


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
        served = reachable(units)
        self.slices = [_native_slice(here) for here in slices_of(units, served, placement, rank, extents)]
        self.reaches = [here and not placement.local(layer, rank) for layer, here in enumerate(served)]
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

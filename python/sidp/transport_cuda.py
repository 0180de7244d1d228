"""Shares in device memory that peers map, and the choice of a transport between ranks on GPUs."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from ._native import C
from .backups import BackupPlan
from .control import ControlPlane
from .device import device_bytes
from .errors import ConfigError, SidpError
from .spill import SplitMemory
from .transport import ShmTransport
from .transport_gpu import GpuTransport, HostTransport, takes_turns

logger = logging.getLogger(__name__)

HANDLES = ("ipc", "vmm")  # ways to reach another rank's device memory, in the order in which they are tried
_DESCRIPTORS_S = 20.0  # for the exchange of descriptors between processes that are all there
_REGION_ALIGNMENT = 256  # of CaS mailboxes behind the extents


class CudaTransport(GpuTransport):
    """One device arena a rank, exported once and opened once by every peer on the peer's own device.

    Collective: allocates, opens and probes every peer's memory, before anything is loaded. Behind the extents lie
    ``region_bytes`` of CaS mailboxes. ``handles`` is "ipc" (cudaMalloc and cudaIpc) or "vmm" (the virtual memory API, whose
    descriptors travel over unix sockets).

    Raises:
        PeerAccessRefused: some rank cannot read another's memory; raised on all ranks alike.
    """

    def __init__(
        self,
        control: ControlPlane,
        extent_bytes: list[int],
        device: torch.device,
        region_bytes: int = 0,
        handles: str = "ipc",
        host_bytes: list[int] | None = None,
    ):
        super().__init__(
            control, host_bytes or [0] * control.world_size, device, C.cas_bells_bytes if region_bytes else 0
        )
        self.region_bytes = region_bytes
        self.handles = handles
        self._share_bytes = extent_bytes
        self._device_bytes = [
            self._region_offset(rank) + region_bytes if region_bytes else nbytes
            for rank, nbytes in enumerate(extent_bytes)
        ]
        self._peers: dict[int, Any] = {}
        rank = control.rank
        refusal, handle = "", b""
        self._memory = None
        try:
            self._memory = C.CudaArena(
                rank, control.world_size, control.token, self._device_bytes[rank], device.index, handles
            )
            if control.world_size > 1:
                handle = self._memory.handle()
        except ConfigError:
            raise  # no memory: no other kind would help
        except SidpError as error:
            refusal = str(error)
        records = control.exchange("device arena", handle)
        descriptors: list[Any] = [None] * control.world_size
        if handles == "vmm" and control.world_size > 1:
            descriptors, problem = self._exchange_descriptors(refusal)
            refusal = refusal or problem
        refusals = control.exchange("peer access", (refusal or self._open_all(records, descriptors)).encode())
        for other, reason in enumerate(refusals):
            if reason:
                self.close()
                raise PeerAccessRefused(f"rank {other}: {reason.decode(errors='replace')}")

    def _exchange_descriptors(self, refusal: str) -> tuple[list[Any], str]:
        """Every rank's descriptor, and why there is none. Collective, also for a rank with a ``refusal``."""
        control, exchange, address = self._control, None, b""
        if not refusal:
            try:
                exchange = C.DescriptorExchange(control.rank, control.world_size, control.token)
                address = exchange.address
            except SidpError as error:
                refusal = str(error)
        addresses = control.exchange("descriptor addresses", address)
        if exchange is None or not all(addresses):
            return [], refusal or "another rank has no descriptor to give"
        try:
            own = self._memory.share()
            return exchange.run(own.fd, addresses, min(_DESCRIPTORS_S, control.timeout_s)), ""
        except SidpError as error:
            return [], str(error)

    def _open_all(self, records: list[bytes], descriptors: list[Any]) -> str:
        control = self._control
        for rank, record in enumerate(records):
            if rank == control.rank or not record:
                continue
            try:
                self._peers[rank] = C.CudaPeerMapping(
                    record,
                    rank,
                    control.world_size,
                    control.token,
                    self._device_bytes[rank],
                    self._device.index,
                    descriptors[rank],
                )
            except SidpError as error:
                return str(error)
        return ""

    def extents(self) -> torch.Tensor:
        return self.extents_of(self._control.rank)

    def extents_of(self, rank: int) -> torch.Tensor:
        """That rank's extents, read in place; only for ranks on this device."""
        owner = self._device_arena(rank)
        return device_bytes(owner.extents, self._share_bytes[rank], owner, self._device)

    def _region_offset(self, rank: int) -> int:
        return -(-self._share_bytes[rank] // _REGION_ALIGNMENT) * _REGION_ALIGNMENT

    def _region(self, rank: int) -> int:
        return self.source(rank) + self._region_offset(rank)

    def write_region_header(self, geometry) -> None:
        C.CudaCas.write_header(geometry, self._region(self._control.rank), self.pool_id, self._device.index)

    def cas_arguments(self) -> dict:
        pages = [self._region_of(owner) for owner in self._owners()]
        pins = [C.PinnedRange(page, C.cas_bells_bytes, False, self._device.index) for page in pages]
        self._pins += pins
        return {
            "device": self._device,
            "bells": [pin.device_address for pin in pins],
            "own_bells": pages[self._control.rank],
            "pool_id": self.pool_id,
            "regions": [self._region(rank) for rank in range(self._control.world_size)],
            "extents": self.source(self._control.rank),
            "watch": self._control.watch,
            "activity": self._arena.activity,
            "keep": self._keep(),
        }

    def ring_arguments(self) -> dict:
        arguments = super().ring_arguments()
        if takes_turns(self._control.world_size):
            arguments["turns"] = [self._device_arena(rank).turns for rank in range(self._control.world_size)]
        return arguments

    def source(self, rank: int) -> int:
        return self._device_arena(rank).extents

    def _device_arena(self, rank: int):
        """That rank's arena in device memory as this one sees it."""
        return self._memory if rank == self._control.rank else self._peers[rank]

    def _keep(self) -> list:
        return [*self._owners(), self._memory, *self._peers.values()]

    def _close_mappings(self) -> None:
        for mapping in self._peers.values():
            mapping.close()
        self._peers = {}

    def close(self) -> None:
        super().close()
        self._memory = None  # freed with the last view of it


class SpillTransport(CudaTransport):
    """Of every rank's share, the first ``cuts[rank]`` bytes in its device arena and the rest in pinned host memory.

    Collective, and raises PeerAccessRefused, as CudaTransport.
    """

    def __init__(
        self,
        control: ControlPlane,
        extent_bytes: list[int],
        device: torch.device,
        cuts: list[int],
        handles: str = "ipc",
    ):
        rest = [nbytes - cut for nbytes, cut in zip(extent_bytes, cuts, strict=True)]
        super().__init__(control, cuts, device, handles=handles, host_bytes=rest)
        self._cuts = cuts

    def extents(self) -> SplitMemory:
        return SplitMemory(super().extents(), ShmTransport.extents(self))

    def ring_arguments(self) -> dict:
        return {**super().ring_arguments(), "cuts": self._cuts, "host_sources": self._host_sources}


class BackedTransport(CudaTransport):
    """Shares in device arenas, and backups of the others' in pinned host memory: ``backup_bytes`` by rank.

    Collective, and raises PeerAccessRefused, as CudaTransport.
    """

    def __init__(
        self,
        control: ControlPlane,
        extent_bytes: list[int],
        device: torch.device,
        backup_bytes: list[int],
        handles: str = "vmm",
    ):
        super().__init__(control, extent_bytes, device, handles=handles, host_bytes=backup_bytes)

    def backups(self) -> torch.Tensor:
        return ShmTransport.extents(self)

    def backup_area(self, rank: int) -> int:
        return self._control.world_size + rank

    def ring_arguments(self) -> dict:
        arguments = super().ring_arguments()
        return {**arguments, "sources": arguments["sources"] + self._host_sources}


class PeerAccessRefused(Exception):
    """GPUs of the group do not reach each other's memory; the message says which rank found out, and how."""


def open_gpu_transport(
    control: ControlPlane,
    extent_bytes: list[int],
    device: torch.device,
    region_bytes: int = 0,
    cuts: list[int] | None = None,
    backups: BackupPlan | None = None,
) -> GpuTransport:
    """Collective: device memory where every rank can read every other's, pinned host memory otherwise (without CaS).

    SIDP_P2P=auto|ipc|vmm|host: "ipc" and "vmm" refuse to fall back, "host" asks for host memory; "auto" tries them in
    this order. With ``cuts``, what of each share lies beyond them is in host memory in any case. With ``backups``, only memory
    that outlives its process is taken: copies that are under way when a rank is lost still read from it.
    """
    wish = os.environ.get("SIDP_P2P", "auto")
    if wish not in ("auto", *HANDLES, "host"):
        raise ConfigError(f"environment variable SIDP_P2P={wish!r}: expected 'auto', 'ipc', 'vmm' or 'host'")
    if wish == "host":
        return HostTransport(control, extent_bytes, device)
    kinds = HANDLES if wish == "auto" else (wish,)
    if backups is not None and backups.kind is not None:
        if wish == "ipc":
            raise ConfigError(
                "SIDP_P2P=ipc with redundancy=1: such memory goes with its process; use SIDP_P2P=auto or vmm"
            )
        kinds = ("vmm",)
    refusals = []
    for handles in kinds:
        try:
            if backups is not None and backups.apart:
                return BackedTransport(control, extent_bytes, device, backups.host_bytes(), handles)
            if cuts is not None:
                return SpillTransport(control, extent_bytes, device, cuts, handles)
            return CudaTransport(control, extent_bytes, device, region_bytes, handles)
        except PeerAccessRefused as refusal:
            refusals.append(f"{handles}: {refusal}")
    if wish != "auto":
        raise ConfigError(f"SIDP_P2P={wish}, but {refusals[0]}")
    logger.warning("sidp: weights stay in pinned host memory: %s", "; ".join(refusals))
    return HostTransport(control, extent_bytes, device)

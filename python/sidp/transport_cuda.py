"""Where shares live when the ranks compute on GPUs: in device memory that peers map, or in pinned host memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from ._native import C
from .control import ControlPlane
from .errors import ConfigError, SidpError
from .spill import SplitMemory
from .transport import ShmTransport

logger = logging.getLogger(__name__)

_PAGE = 4096
HANDLES = ("ipc", "vmm")  # ways to reach another rank's device memory, in the order in which they are tried
_DESCRIPTORS_S = 20.0  # for the exchange of descriptors between processes that are all there
_REGION_ALIGNMENT = 256  # of CaS mailboxes behind the extents


def choose_device(device) -> torch.device:
    """The device a pool computes on; None takes the current CUDA device where the build and the machine have one."""
    with_cuda = getattr(C, "with_cuda", False) and torch.cuda.is_available()
    chosen = torch.device(("cuda" if with_cuda else "cpu") if device is None else device)
    if chosen.type == "cuda" and with_cuda:
        return torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
    if chosen.type != "cpu":
        raise ConfigError(
            f"device={device!r}: this build or machine has the CPU backend only; use device='cpu' or leave it out"
        )
    return chosen


class _DeviceBuffer:
    """What torch reads an address from; the tensor keeps this object, and this object keeps the memory's owner."""

    def __init__(self, address: int, nbytes: int, owner: Any):
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def device_bytes(address: int, nbytes: int, owner: Any, device: torch.device) -> torch.Tensor:
    """A uint8 tensor over ``nbytes`` of device memory; ``owner`` lives at least as long as any view of it."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        return torch.as_tensor(_DeviceBuffer(address, nbytes, owner), device=device)


class _GpuTransport(ShmTransport):
    """What both kinds share: a ShmArena for the words the host reads, and the ring's arguments."""

    own_is_remote = False  # whether even the rank's own share has to be fetched
    region_bytes = 0  # of CaS mailboxes in device memory

    def __init__(self, control: ControlPlane, host_bytes: list[int], device: torch.device):
        super().__init__(control, host_bytes)
        self.region_bytes = 0  # those of the base class would be in host memory
        self._device = device
        self._pins: list = []

    def connect(self) -> None:
        torch.cuda.synchronize(self._device)  # what was loaded has arrived before anyone is told
        super().connect()

    def source(self, rank: int) -> int:
        """Address of that rank's extents as this device reads them."""
        raise NotImplementedError

    def ring_arguments(self) -> dict:
        activity = self._arena.activity
        page = activity // _PAGE * _PAGE
        pin = C.PinnedRange(page, _PAGE, False, self._device.index)
        self._pins.append(pin)
        return {
            "sources": [self.source(rank) for rank in range(self._control.world_size)],
            "dead_rank": self._control.watch.dead_word,
            "device": self._device.index,
            "own_is_remote": self.own_is_remote,
            "activity": activity,
            "device_activity": pin.device_address + activity - page,
            "keep": (self._keep(), self._pins, self._control.watch),
            **_ring_settings(),
        }

    def _keep(self) -> list:
        return self._owners()

    def _pin_host_parts(self) -> list[int]:
        """Every rank's extents in shared host memory, pinned, as this device addresses them; by rank."""
        own, addresses = self._control.rank, []
        for rank, owner in enumerate(self._owners()):
            if self._extent_bytes[rank] == 0:
                addresses.append(owner.extents)
                continue
            pin = C.PinnedRange(owner.extents, self._extent_bytes[rank], rank != own, self._device.index)
            self._pins.append(pin)
            addresses.append(pin.device_address)
        return addresses

    def serve_until_all_closed(self, stop_serving: Callable[[], None]) -> None:
        torch.cuda.synchronize(self._device)  # readers stop
        if self.region_bytes:  # answers are written into the peers' memory until all have finished
            super().serve_until_all_closed(stop_serving)
            self._close_mappings()
            self._arena.set_phase("closed")
            self._wait_for_peers(("closed", "failed"))
            return
        # Importers close before this rank says that it needs nobody any more.
        self._close_mappings()
        super().serve_until_all_closed(stop_serving)

    def _close_mappings(self) -> None:
        pass

    def close(self) -> None:
        self._close_mappings()
        for pin in self._pins:
            pin.close()
        self._pins = []
        super().close()


class CudaTransport(_GpuTransport):
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
        super().__init__(control, host_bytes or [0] * control.world_size, device)
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
        own = rank == self._control.rank
        owner = self._memory if own else self._peers[rank]
        return device_bytes(owner.extents, self._share_bytes[rank], owner, self._device)

    def _region_offset(self, rank: int) -> int:
        return -(-self._share_bytes[rank] // _REGION_ALIGNMENT) * _REGION_ALIGNMENT

    def _region(self, rank: int) -> int:
        return self.source(rank) + self._region_offset(rank)

    def write_region_header(self, geometry) -> None:
        C.CudaCas.write_header(geometry, self._region(self._control.rank), self.pool_id, self._device.index)

    def cas_arguments(self) -> dict:
        return {
            "device": self._device,
            "pool_id": self.pool_id,
            "regions": [self._region(rank) for rank in range(self._control.world_size)],
            "extents": self.source(self._control.rank),
            "watch": self._control.watch,
            "activity": self._arena.activity,
            "keep": self._keep(),
        }

    def source(self, rank: int) -> int:
        return (self._memory if rank == self._control.rank else self._peers[rank]).extents

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
        self._host_sources: list[int] = []

    def extents(self) -> SplitMemory:
        return SplitMemory(super().extents(), ShmTransport.extents(self))

    def connect(self) -> None:
        super().connect()
        self._host_sources = self._pin_host_parts()

    def ring_arguments(self) -> dict:
        return {**super().ring_arguments(), "cuts": self._cuts, "host_sources": self._host_sources}


class HostTransport(_GpuTransport):
    """Shares in shared host memory, pinned by every rank that reads them: the host tier, and what is left where GPUs
    cannot reach each other."""

    own_is_remote = True

    def __init__(self, control: ControlPlane, extent_bytes: list[int], device: torch.device):
        super().__init__(control, extent_bytes, device)
        self._sources: list[int] = []

    def connect(self) -> None:
        super().connect()
        self._sources = self._pin_host_parts()

    def source(self, rank: int) -> int:
        return self._sources[rank]


class PeerAccessRefused(Exception):
    """GPUs of the group do not reach each other's memory; the message says which rank found out, and how."""


def open_gpu_transport(
    control: ControlPlane,
    extent_bytes: list[int],
    device: torch.device,
    region_bytes: int = 0,
    cuts: list[int] | None = None,
) -> _GpuTransport:
    """Collective: device memory where every rank can read every other's, pinned host memory otherwise (without CaS).

    SIDP_P2P=auto|ipc|vmm|host: "ipc" and "vmm" refuse to fall back, "host" asks for host memory; "auto" tries them in
    this order. With ``cuts``, what of each share lies beyond them is in host memory in any case.
    """
    wish = os.environ.get("SIDP_P2P", "auto")
    if wish not in ("auto", *HANDLES, "host"):
        raise ConfigError(f"environment variable SIDP_P2P={wish!r}: expected 'auto', 'ipc', 'vmm' or 'host'")
    if wish == "host":
        return HostTransport(control, extent_bytes, device)
    refusals = []
    for handles in HANDLES if wish == "auto" else (wish,):
        try:
            if cuts is not None:
                return SpillTransport(control, extent_bytes, device, cuts, handles)
            return CudaTransport(control, extent_bytes, device, region_bytes, handles)
        except PeerAccessRefused as refusal:
            refusals.append(f"{handles}: {refusal}")
    if wish != "auto":
        raise ConfigError(f"SIDP_P2P={wish}, but {refusals[0]}")
    logger.warning("sidp: weights stay in pinned host memory: %s", "; ".join(refusals))
    return HostTransport(control, extent_bytes, device)


def _ring_settings() -> dict:
    poison = os.environ.get("SIDP_POISON")
    text = os.environ.get("SIDP_SLICE_MB", "0")
    try:
        slice_mb = float(text)
    except ValueError:
        slice_mb = -1.0
    if not 0 <= slice_mb < 1e6:
        raise ConfigError(f"environment variable SIDP_SLICE_MB={text!r}: expected MB, 0 for whole copies")
    return {
        "poison": C.debug_build if poison is None else poison == "1",
        "hand_over": os.environ.get("SIDP_HAND_OVER", "events"),
        "slice_bytes": int(slice_mb * (1 << 20)),
    }


def device_report() -> list[dict]:
    """What each GPU of this machine can do for a pool; empty where the build or the machine has none."""
    if not getattr(C, "with_cuda", False):
        return []
    report = []
    for index in range(C.cuda_device_count()):
        facts = C.cuda_device_facts(index)
        report.append(
            {
                "index": index,
                "name": facts.name,
                "uuid": facts.uuid,
                "pci": facts.pci,
                "multiprocessors": facts.multiprocessors,
                "copy_engines": facts.copy_engines,
                "total_bytes": facts.total_bytes,
                "free_bytes": facts.free_bytes,
                "reaches": list(facts.peers),
                "reaches_rank": list(facts.peer_ranks),
                "vmm_refusal": C.vmm_refusal(index),
                "mps": bool(os.environ.get("CUDA_MPS_PIPE_DIRECTORY")) or os.path.exists("/tmp/nvidia-mps/control"),
            }
        )
    return report

"""What every transport between ranks on GPUs has in common, and the one whose shares lie in pinned host memory."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from ._native import C
from .control import ControlPlane
from .errors import ConfigError
from .transport import ShmTransport, poison_wanted

_PAGE = 4096


class GpuTransport(ShmTransport):
    """What both kinds share: a ShmArena for the words the host reads, and the ring's arguments."""

    own_is_remote = False  # whether even the rank's own share has to be fetched
    region_bytes = 0  # of CaS mailboxes in device memory

    def __init__(self, control: ControlPlane, host_bytes: list[int], device: torch.device, bells_bytes: int = 0):
        super().__init__(control, host_bytes, bells_bytes)  # the bells lie where the CPU backend has mailboxes
        self.region_bytes = 0
        self._device = device
        self._pins: list = []
        self._host_sources: list[
            int
        ] = []  # by rank, once connected: its part in host memory as this device addresses it

    def connect(self) -> None:
        torch.cuda.synchronize(self._device)  # what was loaded has arrived before anyone is told
        super().connect()
        self._host_sources = self._pin_host_parts()

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


class HostTransport(GpuTransport):
    """Shares in shared host memory, pinned by every rank that reads them: the host tier, and what is left where GPUs
    cannot reach each other."""

    own_is_remote = True

    def source(self, rank: int) -> int:
        return self._host_sources[rank]


def takes_turns(world_size: int) -> bool:
    """Whether the readers of one owner take turns: by default where an owner has more than one.

    Raises:
        ConfigError: SIDP_TURNS is neither auto, 0 nor 1.
    """
    wish = os.environ.get("SIDP_TURNS", "auto")
    if wish not in ("auto", "0", "1"):
        raise ConfigError(f"environment variable SIDP_TURNS={wish!r}: expected auto, 0 or 1")
    return world_size > 2 if wish == "auto" else wish == "1"


def _ring_settings() -> dict:
    text = os.environ.get("SIDP_SLICE_MB", "0")
    try:
        slice_mb = float(text)
    except ValueError:
        slice_mb = -1.0
    if not 0 <= slice_mb < 1e6:
        raise ConfigError(f"environment variable SIDP_SLICE_MB={text!r}: expected MB, 0 for whole copies")
    return {
        "poison": poison_wanted(),
        "hand_over": os.environ.get("SIDP_HAND_OVER", "events"),
        "slice_bytes": int(slice_mb * (1 << 20)),
    }

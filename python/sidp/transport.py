"""Where a rank's share lives and how the peers' shares are reached."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import time
from collections.abc import Callable

import torch

from ._native import C
from .control import ControlPlane
from .errors import ConfigError
from .memory import host_bytes
from .probe import choose_shm_kind

logger = logging.getLogger(__name__)

# First page of the mailbox area: the word by which readers of a capped owner take turns (see docs/protocol.md).
_EGRESS_BYTES = 4096
# Further words of that page, for a group that survives a loss (docs/protocol_survival.md).
_VERDICT_AT, _FILLED_AT = 128, 256
_POLL_S = 0.005


class LocalMemory:
    """A share that nobody else reads: groups of one, and pools that keep everything local."""

    region_bytes = 0

    def __init__(self, nbytes: int, device: torch.device | str = "cpu"):
        self._memory = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def extents(self) -> torch.Tensor:
        return self._memory

    def mark_failed(self) -> None:
        pass

    def close(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)


class ShmTransport:
    """One arena in POSIX shared memory, and the peers' arenas mapped read-only.

    Args:
        control: the group's control plane.
        extent_bytes: every rank's extent area, by rank.
        region_bytes: of each rank's CaS mailboxes; 0 where nobody uses CaS.
    """

    def __init__(self, control: ControlPlane, extent_bytes: list[int], region_bytes: int = 0):
        control.require_one_host()
        self._control = control
        self._extent_bytes = extent_bytes
        self.region_bytes = region_bytes
        self._mailbox_bytes = _EGRESS_BYTES + region_bytes
        self.kind, self.kind_reason = choose_shm_kind(control)
        self._arena = C.ShmArena(
            rank=control.rank,
            world_size=control.world_size,
            token=control.token,
            extent_bytes=extent_bytes[control.rank],
            mailbox_bytes=self._mailbox_bytes,
            kind=self.kind,
        )
        control.watch.attach_own(self._arena)
        self._mappings: dict[int, object] = {}

    def extents(self) -> torch.Tensor:
        return host_bytes(self._arena.extents, self._extent_bytes[self._control.rank], self._arena)

    def connect(self) -> None:
        """Collective: maps every peer's arena; afterwards no name leads to any of them."""
        control = self._control
        self._arena.set_phase("committed")
        handles = control.exchange("arena", self._arena.handle())
        for rank, handle in enumerate(handles):
            if rank == control.rank:
                continue
            self._mappings[rank] = C.PeerMapping(
                handle=handle,
                rank=rank,
                world_size=control.world_size,
                token=control.token,
                extent_bytes=self._extent_bytes[rank],
                mailbox_bytes=self._mailbox_bytes,
            )
            control.watch.attach(self._mappings[rank])
        control.barrier("mapped")
        self._arena.unlink()

    def ring_arguments(self) -> dict:
        """What the ring needs of the transport: sources by rank, the liveness word, and what keeps them alive."""
        owners = self._owners()
        return {
            "sources": [(owner.extents, owner.mailboxes) for owner in owners],
            "dead_rank": self._control.watch.dead_word,
            "keep": (owners, self._control.watch),
            "activity": self._arena.activity,
            **_ring_settings(),
        }

    def write_region_header(self, geometry) -> None:
        """Before connect(): says what this rank's CaS mailboxes look like."""
        geometry.write_header(self._region_of(self._arena), self.pool_id)

    def cas_arguments(self) -> dict:
        """What CaS needs of the connected transport."""
        owners = self._owners()
        own = self._control.rank
        return {
            "regions": [self._region_of(owner) for owner in owners],
            "extents": self._arena.extents,
            "watch": self._control.watch,
            "settings": {
                "pool_id": self.pool_id,
                "activity": self._arena.activity,
                "phases": [0 if rank == own else owner.phase_word for rank, owner in enumerate(owners)],
                "link_bytes_per_s": rate_from_environment("SIDP_CPU_LINK_GBPS"),
                "keep": (owners, self._control.watch),
            },
        }

    @property
    def pool_id(self) -> int:
        return int.from_bytes(self._control.token[:8], "little")

    def extents_of(self, rank: int) -> torch.Tensor:
        """That rank's extent area as it is mapped here; a peer's may only be read."""
        return host_bytes(self._owners()[rank].extents, self._extent_bytes[rank], self._owners()[rank])

    def backups(self) -> torch.Tensor:
        """The area with this rank's backups of others' extents; a Place counts from its begin."""
        return self.extents()

    def backup_area(self, rank: int) -> int:
        """Which of the ring's sources is the area with that rank's backups."""
        return rank

    def verdict_word(self):
        """The one word by which the group agrees on a lost rank. It outlives every process that has not mapped it last."""
        return C.SharedWord(self._owners()[0].mailboxes + _VERDICT_AT, self._owners()[0])

    def filled_word(self, rank: int):
        """What ``rank`` says of the backups that it restored."""
        return C.SharedWord(self._owners()[rank].mailboxes + _FILLED_AT, self._owners()[rank])

    def takes_part(self, rank: int) -> bool:
        """Whether ``rank`` lives and has neither closed nor failed."""
        if rank == self._control.rank:
            return True
        return self._mappings[rank].phase not in ("closed", "failed") and self._control.watch.state(rank) != "dead"

    @staticmethod
    def _region_of(owner) -> int:
        """Address of an arena's ``region_bytes`` as mapped here."""
        return owner.mailboxes + _EGRESS_BYTES

    def _owners(self) -> list:
        own = self._control.rank
        return [self._arena if rank == own else self._mappings[rank] for rank in range(self._control.world_size)]

    def serve_until_all_closed(self, stop_serving: Callable[[], None]) -> None:
        """Keeps this rank's memory there until every peer has finished, failed or died; then calls ``stop_serving``."""
        self._arena.set_phase("finished")
        self._wait_for_peers(("finished", "closed", "failed"))
        stop_serving()

    def _wait_for_peers(self, phases: tuple[str, ...]) -> None:
        """Gives up on peers that have used no layer for the timeout: they keep what they have mapped."""
        timeout = self._control.timeout_s
        activity, since = None, time.monotonic()
        while waiting := [rank for rank in self._mappings if not self._is_in(rank, phases)]:
            now = [self._mappings[rank].activity for rank in waiting]
            if now != activity:
                activity, since = now, time.monotonic()
            if time.monotonic() - since > timeout:
                logger.warning(
                    "sidp: ranks %s neither used the pool nor closed it for %g s; closing without them",
                    waiting,
                    timeout,
                )
                return
            time.sleep(_POLL_S)

    def _is_in(self, rank: int, phases: tuple[str, ...]) -> bool:
        return self._mappings[rank].phase in phases or self._control.watch.state(rank) == "dead"

    def forget_peers(self) -> None:
        """Takes the peers' pages out of this process's resident set; the next use maps them again."""
        advise = ctypes.CDLL(None, use_errno=True).madvise
        for rank, mapping in self._mappings.items():
            begin = mapping.extents
            end = begin + self._extent_bytes[rank]
            first = begin - begin % mmap.PAGESIZE  # extents begin on a page; the last may be shared with nothing else
            if advise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED) != 0:
                error = ctypes.get_errno()
                raise OSError(error, f"madvise on the share of rank {rank}: {os.strerror(error)}")

    def mark_failed(self) -> None:
        self._arena.set_phase("failed")

    def close(self) -> None:
        # The memory itself goes when the last view of it does; nothing names it any more.
        self._control.watch.detach()
        self._arena.set_phase("closed")
        self._arena.unlink()
        self._mappings = {}
        self._arena = None
        if self.kind == "named":
            C.sweep_names()  # what a killed rank could not unlink any more


def rate_from_environment(variable: str) -> float:
    """Bytes per second from an environment variable in GB/s; 0 means no cap."""
    text = os.environ.get(variable, "0")
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 <= rate < float("inf"):
        raise ConfigError(f"environment variable {variable}={text!r}: expected GB/s, 0 for no cap")
    return rate * 1e9


def poison_wanted() -> bool:
    """Whether a slot is filled with NaN before each fetch: in debug builds, or as SIDP_POISON says."""
    wish = os.environ.get("SIDP_POISON")
    return C.debug_build if wish is None else wish == "1"


def _ring_settings() -> dict:
    return {
        "poison": poison_wanted(),
        "link_bytes_per_s": rate_from_environment("SIDP_CPU_LINK_GBPS"),
        "owner_bytes_per_s": rate_from_environment("SIDP_CPU_OWNER_GBPS"),
    }

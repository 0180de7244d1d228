"""Where the second copy of every extent lies. Pure arithmetic, the same on all ranks."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError

BACKUPS = ("peer", "host", "file")


@dataclass(frozen=True)
class Place:
    """An extent's second copy: at ``offset`` of the area of rank ``holder`` that has its backups, ``nbytes`` long."""

    layer: int
    owner: int
    holder: int
    offset: int
    nbytes: int


class BackupPlan:
    """Places for the backups of a placement.

    The units of one owner are spread over all other ranks in turn, so that after a death its work is too. They lie
    behind the holder's own extents; with kind "host" and arenas in device memory, in host memory of the holder. Where the
    arenas are host memory already, "host" places nothing: the ranks that have mapped it keep it when its process dies.

    Args:
        placement: the native placement. world_size: of the group. num_layers: of the pool.
        kind: "peer", "host" or "file"; None for no backups.
        on_device: whether the arenas are device memory.

    Attributes:
        apart: whether the backups are in an area of their own, host memory beside the arenas.
    """

    def __init__(self, placement, world_size: int, num_layers: int, kind: str | None, on_device: bool = False):
        self.kind = kind
        self.apart = kind == "host" and on_device
        self._own_bytes = [placement.arena_bytes(rank) for rank in range(world_size)]
        self._begins = [0] * world_size if self.apart else self._own_bytes
        self._ends = list(self._begins)
        self.places: list[Place] = []
        if kind is None or (kind == "host" and not self.apart) or world_size < 2:
            return
        turns = [0] * world_size
        for layer in range(num_layers):
            for owner in range(world_size):
                nbytes = placement.share(layer, owner).bytes
                if placement.resident(layer) or not nbytes:
                    continue
                holder = (owner + 1 + turns[owner] % (world_size - 1)) % world_size
                turns[owner] += 1
                self.places.append(Place(layer, owner, holder, self._ends[holder], nbytes))
                self._ends[holder] += nbytes

    def extent_bytes(self) -> list[int]:
        """By rank, the extent area: its own extents, then its backups of others' unless they are apart."""
        return list(self._own_bytes if self.apart else self._ends)

    def host_bytes(self) -> list[int]:
        """By rank, host memory beside its device arena."""
        return [self.backup_bytes(rank) if self.apart else 0 for rank in range(len(self._ends))]

    def backup_bytes(self, rank: int) -> int:
        """Address space for the rank's backups; with "file" it takes memory only after a death."""
        return self._ends[rank] - self._begins[rank]

    def kept_bytes(self, rank: int) -> int:
        """Of the memory that the arenas are in, what the rank's backups take from commit() on."""
        return self.backup_bytes(rank) if self.kind == "peer" else 0

    def of(self, owner: int) -> list[Place]:
        return [place for place in self.places if place.owner == owner]


def check_redundancy(redundancy: int, backup: str) -> None:
    """ConfigError where the two fields of PoolConfig are not what they may be."""
    if type(redundancy) is not int or redundancy not in (0, 1):
        raise ConfigError(
            f"redundancy must be 0 (a death ends the group) or 1 (one death is survived), got {redundancy!r}"
        )
    if backup not in BACKUPS:
        raise ConfigError(f"backup must be one of {', '.join(BACKUPS)}, got {backup!r}")


def check_backup_on_gpus(backup: str | None) -> None:
    """ConfigError for the kind that GPUs do not have."""
    if backup == "file":
        raise ConfigError(
            "backup='file' would take its memory from the start on GPUs: use 'peer' (device memory) or 'host' (host memory)"
        )

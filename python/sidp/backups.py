"""Where the second copy of every extent lies. Pure arithmetic, the same on all ranks."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError

BACKUPS = ("peer", "host", "file")


@dataclass(frozen=True)
class Place:
    """An extent's second copy: at ``offset`` of the extent area of rank ``holder``, ``nbytes`` long."""

    layer: int
    owner: int
    holder: int
    offset: int
    nbytes: int


class BackupPlan:
    """Places for the backups of a placement.

    The units of one owner are spread over all other ranks in turn, so that after a death its work is too. They lie
    behind the holder's own extents. With kind "host" nothing is placed: the arenas are host memory already, which the
    ranks that have mapped it keep when its process dies.

    Args:
        placement: the native placement. world_size: of the group. num_layers: of the pool.
        kind: "peer", "host" or "file"; None for no backups.
    """

    def __init__(self, placement, world_size: int, num_layers: int, kind: str | None):
        self.kind = kind
        self._own_bytes = [placement.arena_bytes(rank) for rank in range(world_size)]
        self._ends = list(self._own_bytes)
        self.places: list[Place] = []
        if kind not in ("peer", "file") or world_size < 2:
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
        """By rank, the extent area: its own extents, then its backups of others'."""
        return list(self._ends)

    def backup_bytes(self, rank: int) -> int:
        """Address space behind the rank's own extents; with "file" it takes memory only after a death."""
        return self._ends[rank] - self._own_bytes[rank]

    def kept_bytes(self, rank: int) -> int:
        """Memory that the rank's backups take from commit() on."""
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

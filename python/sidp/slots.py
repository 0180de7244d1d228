"""How many ring slots each rank gets, and whether a pool with them frees anything: for the pool and for its planning."""

from __future__ import annotations

from collections.abc import Sequence

from ._native import C
from .errors import ConfigError


def choose_slots(
    placement, wish: int | None, peak_shifting: bool, local: Sequence[Sequence[bool]], kept_bytes: Sequence[int]
) -> tuple[list[int], bool]:
    """(slots by rank, whether the group frees memory).

    Args:
        placement: the native placement.
        wish: the number asked for; None takes the default of each rank.
        peak_shifting: as in PoolConfig.
        local: by rank and layer, what needs no fetch.
        kept_bytes: by rank, what its share takes of the memory that it computes in.

    Raises:
        ConfigError: more slots than any rank has remote layers.
    """
    remote = [len(here) - sum(here) for here in local]
    if wish is not None and max(remote) and not 1 <= wish <= max(remote):
        raise ConfigError(
            f"slots={wish} is out of range: a rank reaches {max(remote)} layers remotely, so 1 ... {max(remote)} "
            f"slots make sense"
        )
    slots = [
        (wish or C.default_slots(placement, rank, peak_shifting, list(here))) if remote[rank] else 0
        for rank, here in enumerate(local)
    ]
    taken = sum(kept_bytes) + sum(slots) * placement.largest_unit_bytes
    return slots, taken < len(slots) * placement.replicated_bytes

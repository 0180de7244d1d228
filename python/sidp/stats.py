"""What a pool has done so far."""

from dataclasses import dataclass, field


@dataclass
class PoolStats:
    """A snapshot; cheap to take. Bytes are bytes, times are seconds, counts start at ``commit()``.

    Attributes:
        active: False where pooling cannot pay and every weight stayed local; ``reason`` says why.
        replicated_bytes: FFN bytes of one rank without pooling.
        owned_bytes: FFN bytes this rank keeps (its share of the pool, and resident layers).
        ring_bytes: bytes of the ring's slots.
        freed_bytes: replicated - owned - ring.
        fetches, fetched_bytes: units brought into the ring, and their bytes that came from other ranks.
        stalls, stall_seconds: uses that found their slot not ready, and the time they waited.
        restarts: uses out of the expected layer order, after which the prefetch was planned anew.
        calls: FFN calls by mode ("local", "was", "cas").
        last_mode, last_mode_reason: the mode of the newest call, and why it was taken.
    """

    rank: int
    world_size: int
    active: bool
    reason: str
    replicated_bytes: int
    owned_bytes: int
    ring_bytes: int
    freed_bytes: int
    slots: int
    fetches: int = 0
    fetched_bytes: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0
    restarts: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    last_mode: str = ""
    last_mode_reason: str = ""

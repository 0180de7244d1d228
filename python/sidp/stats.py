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
        cas_bytes: (CUDA) of device memory that mailboxes and the CaS server's workspace take.
        freed_bytes: replicated - owned - ring - cas.
        fetches, fetched_bytes: units brought into the ring, and their bytes that came from other ranks.
        stalls, stall_seconds: uses that found their slot not ready, and the time they waited.
        restarts: uses out of the expected layer order, after which the prefetch was planned anew.
        link_bytes_per_s: rate at which the copy thread fetched; 0 where it has not.
        pauses: times the prefetch was paused because the rank was in CaS.
        requests_sent, rows_sent, cas_wait_seconds: this rank's CaS requests (one per owner asked), their rows, and
            the time it waited for answers (CUDA: that the owners took, from electing a request to its reply).
        requests_served, rows_served, batches, fused_batches: what this rank's server computed, in how many batches,
            and how many of those joined several requests.
        requests_refused: malformed records and mailboxes this rank's server refused.
        requesters_retired: requesters that died. server_busy_seconds: time the server computed.
        relaunches: (CUDA) launches of the serving kernel that have ended.
        mode_switches: times mode="auto" changed between WaS and CaS.
        decisions: what mode="auto" decided and why, the newest 32 runs of iterations with one verdict, oldest first.
        repairs: (CUDA) slots that a kernel had to fill itself, after graphs and eager calls had mixed.
        backup_bytes: bytes of other ranks' units that this rank keeps in case one is lost; counted in ``owned_bytes``.
        lost_rank: the rank that the group goes on without, -1 for none. recovery_seconds: how long that took here.
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
    cas_bytes: int = 0
    fetches: int = 0
    fetched_bytes: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0
    restarts: int = 0
    link_bytes_per_s: float = 0.0
    pauses: int = 0
    repairs: int = 0
    requests_sent: int = 0
    rows_sent: int = 0
    cas_wait_seconds: float = 0.0
    requests_served: int = 0
    rows_served: int = 0
    batches: int = 0
    fused_batches: int = 0
    requests_refused: int = 0
    requesters_retired: int = 0
    server_busy_seconds: float = 0.0
    relaunches: int = 0
    mode_switches: int = 0
    backup_bytes: int = 0
    lost_rank: int = -1
    recovery_seconds: float = 0.0
    decisions: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    last_mode: str = ""
    last_mode_reason: str = ""

    def add_ring(self, ring) -> None:
        """Takes over what the native ring counted, a CPU ring's or a CUDA ring's."""
        self.fetches, self.fetched_bytes = ring.fetches, ring.fetched_bytes
        self.stalls, self.stall_seconds, self.restarts = ring.stalls, ring.stall_seconds, ring.restarts
        self.repairs, self.pauses = getattr(ring, "repairs", 0), getattr(ring, "pauses", 0)
        fetch_seconds = getattr(ring, "fetch_seconds", 0.0)  # on CUDA the host does not know it
        self.link_bytes_per_s = ring.fetched_bytes / fetch_seconds if fetch_seconds > 0 else 0.0

    def add_cas(self, sent, served) -> None:
        """Takes over what the native requester and server counted."""
        self.requests_sent, self.rows_sent = sent.requests, sent.rows
        self.cas_wait_seconds = sent.wait_seconds
        self.requests_served, self.rows_served = served.requests, served.rows
        self.batches, self.fused_batches = served.batches, served.fused_batches
        self.requests_refused = served.refused + served.broken
        self.requesters_retired, self.server_busy_seconds = served.retired, served.busy_seconds
        self.relaunches = getattr(served, "launches", 0)

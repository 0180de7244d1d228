"""The native core. Addresses, pointers and streams are integers; errors are the classes of sidp.errors."""

debug_build: bool
slot_alignment: int

class TensorLayout:
    name: str
    rows: int
    cols: int
    element_bytes: int
    offset: int
    bytes: int
    def __init__(self, name: str, rows: int, cols: int, element_bytes: int, split: str, groups: int) -> None: ...

class Piece:
    tensor: int
    row: int
    rows: int
    col: int
    cols: int
    offset: int

class UnitLayout:
    tensors: list[TensorLayout]
    bytes: int
    def __init__(self, tensors: list[TensorLayout]) -> None: ...

class Extent:
    owner: int
    offset: int
    bytes: int
    pieces: list[Piece]

class CopyOp:
    owner: int
    source: int
    target: int
    width: int
    height: int
    source_pitch: int
    target_pitch: int

class Placement:
    replicated_bytes: int
    largest_unit_bytes: int
    def __init__(self, kind: str, units: list[UnitLayout], world_size: int, resident_layers: int = 0) -> None: ...
    def owner(self, layer: int) -> int: ...
    def cycle(self, layer: int) -> int: ...
    def resident(self, layer: int) -> bool: ...
    def local(self, layer: int, rank: int) -> bool: ...
    def share(self, layer: int, rank: int) -> Extent: ...
    def copies(self, layer: int, rank: int) -> list[CopyOp]: ...
    def arena_bytes(self, rank: int) -> int: ...
    def unit(self, layer: int) -> UnitLayout: ...

class FetchSchedule:
    order: list[int]
    num_remote: int
    slots: int
    def __init__(self, placement: Placement, rank: int, slots: int, peak_shifting: bool = True) -> None: ...
    def layer(self, index: int) -> int: ...
    def remote_index(self, layer: int) -> int: ...
    def slot(self, index: int) -> int: ...

class Fetch:
    ticket: int
    after: int | None
    index: int
    slot: int

class FetchQueue:
    def __init__(self, schedule: FetchSchedule) -> None: ...
    def next(self) -> Fetch: ...
    def expected_index(self, ticket: int) -> int: ...
    def restart(self, index: int, last_use: list[int]) -> int: ...

def default_slots(placement: Placement, rank: int, peak_shifting: bool = True) -> int: ...

class ProcessIdentity:
    pid: int
    start_time: int
    boot_id: str
    pid_namespace: int
    uid: int
    def __init__(self, pid: int, start_time: int, boot_id: str, pid_namespace: int, uid: int) -> None: ...
    @staticmethod
    def current() -> ProcessIdentity: ...

def available_memory() -> int: ...
def sweep_names(directory: str = "/dev/shm") -> int: ...

class ShmArena:
    kind: str
    extents: int
    mailboxes: int
    extent_bytes: int
    mailbox_bytes: int
    total_bytes: int
    activity: int
    phase: str
    closed: bool
    def __init__(
        self,
        rank: int,
        world_size: int,
        token: bytes,
        extent_bytes: int,
        mailbox_bytes: int = 0,
        kind: str = "memfd",
        directory: str = "/dev/shm",
    ) -> None: ...
    def set_phase(self, phase: str) -> None: ...
    def handle(self) -> bytes: ...
    def unlink(self) -> None: ...
    def close(self) -> None: ...

class PeerMapping:
    rank: int
    extents: int
    mailboxes: int
    extent_bytes: int
    mailbox_bytes: int
    activity: int
    phase: str
    closed: bool
    def __init__(
        self,
        handle: bytes,
        rank: int,
        world_size: int,
        token: bytes,
        extent_bytes: int,
        mailbox_bytes: int = 0,
        directory: str = "/dev/shm",
    ) -> None: ...
    def close(self) -> None: ...

class Descriptor:
    fd: int
    def close(self) -> None: ...

class DescriptorExchange:
    address: bytes
    def __init__(self, rank: int, world_size: int, token: bytes) -> None: ...
    def run(self, fd: int, addresses: list[bytes], timeout_s: float) -> list[Descriptor]: ...

class PeerWatch:
    dead_word: int
    def __init__(
        self, rank: int, world_size: int, beat_ms: int = 100, stale_beats: int = 30, pidfd: bool = True
    ) -> None: ...
    def watch(self, peer: int, identity: ProcessIdentity) -> None: ...
    def attach(self, mapping: PeerMapping) -> None: ...
    def attach_own(self, arena: ShmArena) -> None: ...
    def detach(self) -> None: ...
    def dead_rank(self) -> int: ...
    def state(self, peer: int) -> str: ...
    def lose(self, rank: int) -> None: ...
    def go_on_without(self, peer: int) -> None: ...
    def check(self, doing: str) -> None: ...
    def stop(self) -> None: ...

class SharedWord:
    def __init__(self, address: int, keep: object) -> None: ...
    def load(self) -> int: ...
    def store(self, value: int) -> None: ...
    def set_once(self, value: int) -> int: ...

class RingStats:
    fetches: int
    fetched_bytes: int
    stalls: int
    stall_seconds: float
    restarts: int

class Ring:
    bytes: int
    schedule: FetchSchedule
    def __init__(
        self,
        placement: Placement,
        rank: int,
        sources: list[tuple[int, int]],
        dead_rank: int,
        slots: int,
        peak_shifting: bool = True,
        poison: bool = False,
        link_bytes_per_s: float = 0.0,
        owner_bytes_per_s: float = 0.0,
        activity: int = 0,
        keep: object = None,
        paused: bool = False,
    ) -> None: ...
    def move_extents(self, from_rank: int, moved: list[tuple[int, int, int, int]]) -> None: ...
    def owners(self, layer: int) -> list[int]: ...
    def acquire(self, layer: int, timeout_s: float) -> None: ...
    def release(self, layer: int) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def stop(self) -> None: ...
    def slot_address(self, slot: int) -> int: ...
    def stats(self) -> RingStats: ...
    def start_trace(self, capacity: int) -> None: ...
    def trace(self) -> list[tuple[str, int, int, float, float]]: ...

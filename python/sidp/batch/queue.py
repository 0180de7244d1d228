"""The board: one file that all ranks map. Who has which request, and how far every rank is.

Steps of a request's life: (1) take: free -> taken by a rank, under the lock. (2) settle: its line is appended and it
becomes done, both under the lock. A rank that dies between (1) and (2) leaves it taken; (3) reap: a survivor sees the
death, looks whether the line was written nevertheless, and sets it done or free again. A request that several ranks
died over is given up.

The lock is flock, which the kernel releases when its holder dies. Liveness is a byte-range lock that each rank holds
on its own byte from `join` to its end. The file lives on this host only.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import ConfigError, LayoutError, SidpError

FREE, DONE = 0, -1  # else rank + 1
MAX_ATTEMPTS = 2  # a request that was in flight in this many deaths is not tried again

# One row of float64 a rank, written by that rank alone. Counts are exact to 2**53.
RANK_FIELDS = (
    "joined", "ready", "finished", "running", "waiting", "peak_running", "succeeded", "failed",
    "prompt_tokens", "output_tokens", "kv_tokens", "kv_capacity", "kv_peak", "preemptions", "request_limit",
    "load_seconds", "busy_seconds", "calls_local", "calls_was", "calls_cas", "stalls", "stall_seconds",
    "fetched_bytes", "owned_bytes", "ring_bytes", "freed_bytes", "replicated_bytes", "pool_active",
    "finished_stop", "finished_length", "last_settled", "first_taken", "tail_began", "gpu", "loaded", "measured",
    "prompt_steps", "prompt_step_seconds", "launched_steps", "launched_step_seconds", "replayed_steps", "replayed_step_seconds",
    "captures", "capture_seconds", "cas_up_to_rows", "was_from_rows",
)  # fmt: skip
_FIELD = {name: index for index, name in enumerate(RANK_FIELDS)}
_HEADER = struct.Struct("<8sIIQQ")  # magic, version, ranks, items, failed rows of the input
_MAGIC, _VERSION = b"SIDPBRD1", 2
_HEADER_BYTES = 64
_LOCK_AT = 1 << 40  # far behind the file's end, where bytes can be locked and not written
_WAIT_S = 60.0
_STEP_S = 0.001


class Board:
    """See the module. `create` makes the file, every process then opens it with `Board(path)`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rank: int | None = None
        self._mutex = threading.RLock()
        self._depth = 0
        self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(self._fd, 0)
            self._parse()
        except (ValueError, struct.error, LayoutError) as error:
            os.close(self._fd)
            raise LayoutError(f"{path} is no board of this version of sidp: {error}") from error

    @staticmethod
    def create(path: str | Path, world_size: int, extents: Sequence[tuple[int, int, int]]) -> None:
        """A board for `world_size` ranks and one item for each (offset, bytes) of the spool, with the tokens that it will hold,
        in the order of handing out.
        """
        items = len(extents)
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            header = _HEADER.pack(_MAGIC, _VERSION, world_size, items, 0)
            file.write(header.ljust(_HEADER_BYTES, b"\0"))
            file.write(bytes(8 * len(RANK_FIELDS) * world_size))
            file.write(np.asarray(extents, dtype=np.int64).tobytes())
            file.write(bytes(8 * items))  # state and attempts, int32 each

    def _parse(self) -> None:
        magic, version, self.world_size, self.items, _ = _HEADER.unpack_from(self._map)
        row, width = 8 * len(RANK_FIELDS), 8
        expected = _HEADER_BYTES + row * self.world_size + (3 * width + 8) * self.items
        if magic != _MAGIC or version != _VERSION or expected != len(self._map):
            raise LayoutError(f"magic {magic!r}, version {version}, {len(self._map)} bytes, expected {expected}")
        at = _HEADER_BYTES
        shape = (self.world_size, len(RANK_FIELDS))
        self._ranks = np.frombuffer(self._map, np.float64, shape[0] * shape[1], at).reshape(shape)
        at += row * self.world_size
        self._extents = np.frombuffer(self._map, np.int64, 3 * self.items, at).reshape(self.items, 3)
        at += 3 * width * self.items
        self._states = np.frombuffer(self._map, np.int32, self.items, at)
        self._attempts = np.frombuffer(self._map, np.int32, self.items, at + 4 * self.items)

    # ---- the lock -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """No other rank and no other thread is inside; may be entered again by its holder. SidpError after a minute."""
        with self._mutex:
            if self._depth == 0:
                self._acquire()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _acquire(self) -> None:
        end = time.monotonic() + _WAIT_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise SidpError(
                        f"the run's lock was not free within {_WAIT_S:g} s: a rank was stopped while it wrote"
                    ) from None
                time.sleep(_STEP_S)

    # ---- ranks ----------------------------------------------------------------------------------------------------

    def join(self, rank: int) -> None:
        """This process is `rank` from here to its end."""
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"rank {rank} has no place on a board of {self.world_size} ranks")
        fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _LOCK_AT + rank)
        self.rank = rank
        self.report(joined=1)

    def alive(self, rank: int) -> bool:
        """Whether `rank` has joined and its process lives; a rank that has not joined yet counts as alive."""
        if rank == self.rank or not self._ranks[rank, _FIELD["joined"]]:
            return True
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _LOCK_AT + rank)
        except (BlockingIOError, PermissionError):
            return True
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, _LOCK_AT + rank)
        return False

    def report(self, **values: float) -> None:
        """Set this rank's own fields."""
        for name, value in values.items():
            self._ranks[self.rank, _FIELD[name]] = value

    def add(self, **values: float) -> None:
        """Add to this rank's own fields."""
        for name, value in values.items():
            self._ranks[self.rank, _FIELD[name]] += value

    def rank_figures(self, rank: int) -> dict[str, float]:
        return dict(zip(RANK_FIELDS, self._ranks[rank].tolist(), strict=True))

    # ---- items ----------------------------------------------------------------------------------------------------

    def extent(self, item: int) -> tuple[int, int]:
        """(offset, bytes) of the item in the spool."""
        offset, size, _ = self._extents[item].tolist()
        return offset, size

    def take(self, count: int, fitting: Callable[[np.ndarray], int] | None = None) -> list[int]:
        """Up to `count` free items, first in the order of handing out; empty where none is free.

        `fitting` is told the tokens of each and answers how many of them to take.
        """
        if count <= 0:
            return []
        with self.lock():
            items = np.flatnonzero(self._states == FREE)[:count]
            items = items[: len(items) if fitting is None else fitting(self._extents[items, 2])].tolist()
            self._states[items] = self.rank + 1
            self._attempts[items] += 1
        return items

    def settle(self, item: int, write: Callable[[], None]) -> bool:
        """Call `write` and mark the item done, in one critical section. False, without writing, where not ours."""
        with self.lock():
            if self._states[item] != self.rank + 1:
                return False
            write()
            self._states[item] = DONE
        return True

    def reap(self, keys: Callable[[list[int]], list[str]], written: Callable[[], Collection[str]]) -> list[int]:
        """Free what dead ranks held; the items now given up, which the caller is to answer with an error.

        `keys` names items, `written` tells the keys in the output: a rank may have died after it wrote and before it
        said so.
        """
        dead = [rank for rank in range(self.world_size) if not self.alive(rank)]
        if not dead:
            return []
        with self.lock():
            held = np.flatnonzero(np.isin(self._states, [rank + 1 for rank in dead])).tolist()
            if not held:
                return []
            there = written()
            done = np.array([key in there for key in keys(held)], dtype=bool)
            held = np.array(held)
            again = ~done & (self._attempts[held] < MAX_ATTEMPTS)
            self._states[held[done]] = DONE
            self._states[held[again]] = FREE
            given_up = held[~done & ~again]
            self._states[given_up] = self.rank + 1  # ours, to settle with an error line
        return given_up.tolist()

    def counts(self) -> dict[str, int]:
        """Items by state: "free", "taken", "done"."""
        states = self._states
        free, done = int((states == FREE).sum()), int((states < 0).sum())
        return {"free": free, "taken": self.items - free - done, "done": done}

    def answered(self) -> int:
        """Items settled by any rank of this run; cheap, and a few behind where a rank died."""
        return int(self._ranks[:, [_FIELD["succeeded"], _FIELD["failed"]]].sum())

    def dead_ranks(self) -> list[int]:
        """Ranks whose processes ended before they had finished."""
        return [r for r in range(self.world_size) if not self._ranks[r, _FIELD["finished"]] and not self.alive(r)]

    def close(self) -> None:
        """Leaves the board; a rank that has not said `finished` counts as dead from here on."""
        if self._fd < 0:
            return
        self._ranks = self._extents = self._states = self._attempts = np.empty(0)
        with contextlib.suppress(BufferError):  # a caller still holds an array; the mapping goes with it
            self._map.close()
        os.close(self._fd)
        self._fd = -1

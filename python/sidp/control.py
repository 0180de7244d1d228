"""The control plane: how the ranks of a group agree before and after the hot path, and never on it.

Bytes travel through the key-value store of torch.distributed, which every launcher and backend has; no
collective of a backend is used and nothing from a peer is unpickled. While a rank waits here it also looks
for peers that have died (by their processes) or failed (they say so), and for a store that is gone, so that
nobody sits out a timeout.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import struct
import time
from collections.abc import Callable
from typing import Any, NoReturn

from ._native import C
from .errors import ConfigError, LayoutError, PeerError, PoolClosedError, SidpError
from .membership import Identity, Membership, require_one_host
from .store import BoundedStore, StoreLost

MAX_PAYLOAD_BYTES = 4 << 20
_MAX_TEXT = 4000  # characters of a published error message
_FIRST_STEP_S, _LAST_STEP_S = 0.001, 0.02  # between two looks at the store
_LOOKS_PER_LEFT_CHECK = 10
_LINGER_S = 5.0  # how long the rank that may host the store stays for the others when it leaves
_TOKEN_BYTES = 16
# Magic, rank, length of the name, job token; then the name and the payload.
_FRAME = struct.Struct("<4sIQ16s")
_MAGIC = b"SDP1"
_ERRORS = {cls.__name__: cls for cls in (SidpError, ConfigError, LayoutError, PeerError, PoolClosedError)}

# Pools are made in the same order on all ranks of a group: the count tells the keys of two pools apart.
_pools_of_group: dict[tuple[int, ...], int] = {}


class ControlPlane:
    """Collective: joins the ranks of ``group`` for one pool.

    Args:
        group: a torch.distributed process group; None is the default group, or a group of one where
            torch.distributed is not initialised.
        timeout_s: bound of every wait in here, in seconds.

    Attributes:
        rank, world_size: within the group. token: 16 bytes drawn by rank 0, the same on all ranks of this
        pool and unlike any other pool's. identities: one Identity a rank. watch: the native PeerWatch over
        all peers.

    Raises:
        ConfigError: the group is unusable. PeerError: a rank did not come, died, or the store is gone.
    """

    def __init__(self, group: Any = None, timeout_s: float = 60.0):
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s must be positive, got {timeout_s!r}")
        self.timeout_s = float(timeout_s)
        member = Membership.of(group)
        self.global_ranks, self.rank = member.global_ranks, member.rank
        self.world_size = len(member.global_ranks)
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self.identities = [Identity.current()]
        self.watch = C.PeerWatch(self.rank, self.world_size)
        self._process = os.getpid()
        self._sequence = 0
        self._failure: SidpError | None = None
        self._published = False
        self._closed = False
        self._store: BoundedStore | None = None
        if self.world_size > 1:
            instance = _pools_of_group[self.global_ranks] = _pools_of_group.get(self.global_ranks, 0) + 1
            prefix = f"sidp/{'-'.join(map(str, self.global_ranks))}/{instance}/"
            try:
                with self._naming_the_store("start"):
                    self._store = BoundedStore(member.store, prefix, self.timeout_s)
                    self._meet()
            except BaseException:
                self._end()
                raise

    # ---- what the pool calls -------------------------------------------------------------------------------

    def exchange(self, name: str, payload: bytes = b"") -> list[bytes]:
        """Collective: every rank gives bytes and gets everyone's, in rank order.

        All ranks must make the same exchanges in the same order; ``name`` is checked against theirs.

        Raises:
            ConfigError: payload of more than MAX_PAYLOAD_BYTES.
            PeerError: a rank died, left, is late or at another exchange; or the store is gone.
            Another rank's own error, published by fail(): the same class, "rank k: ..." before its message.
        """
        self._check_usable(name)
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ConfigError(f"{name}: {len(payload)} bytes, at most {MAX_PAYLOAD_BYTES} can be exchanged")
        if self.world_size == 1:
            return [bytes(payload)]
        step, self._sequence = self._sequence, self._sequence + 1
        keys = {rank: f"{step}/{rank}" for rank in range(self.world_size)}
        frame = _FRAME.pack(_MAGIC, self.rank, len(name.encode()), self.token) + name.encode() + bytes(payload)
        with self._naming_the_store(name):
            self._store.set(keys[self.rank], frame)
            self._wait(keys, name)
            frames = [self._store.get(key) if rank != self.rank else frame for rank, key in keys.items()]
        return [self._unpack(frame, rank, name) for rank, frame in enumerate(frames)]

    def barrier(self, name: str) -> None:
        """Collective: returns once every rank has come here. Raises as exchange() does."""
        self.exchange(name)

    def fail(self, error: BaseException) -> None:
        """Tells the others, who raise the same error where they wait. Never raises anything itself."""
        if self._store is None or self._published or self._failure is not None or self._in_child():
            return
        self._published = True
        kind = next((cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _ERRORS), None)
        text = str(error) if kind else f"{type(error).__name__}: {error}"
        notice = {"type": kind or "SidpError", "message": text[:_MAX_TEXT], "rank": self.rank}
        notice["peer"] = error.rank if isinstance(error, PeerError) else -1
        with contextlib.suppress(StoreLost):
            if not self._store.check(["failure"]):  # the first cause stays
                self._store.set("failure", json.dumps(notice).encode())

    def first_cause(self, error: SidpError) -> SidpError:
        """What another rank has published, of which ``error`` may be a mere consequence here; else ``error``."""
        if self._store is not None and self._failure is None and not self._published:
            with contextlib.suppress(StoreLost):
                if self._store.check(["failure"]):
                    return _parse_failure(self._store.get("failure"), self.world_size)
        return error

    def require_one_host(self) -> None:
        """ConfigError where the group spans hosts or users: shared memory and pids reach neither."""
        require_one_host(self.identities)

    def close(self) -> None:
        """Leaves the group; bounded and idempotent, raises nothing.

        The rank that may host the store stays, for a few seconds at most, until the others have left or died,
        so that they can still read what it published.
        """
        if self._closed:
            return
        self._closed = True
        if self._store is not None and not self._in_child():
            with contextlib.suppress(StoreLost):
                self._store.set(f"left/{self.rank}", b"1")
                if self.global_ranks[self.rank] == 0:
                    self._linger()
        self._end()

    # ---- inside --------------------------------------------------------------------------------------------

    def _meet(self) -> None:
        """The first words: who everyone is, and rank 0's token."""
        found: dict[int, Identity] = {}

        def welcome(rank: int, record: bytes) -> None:
            found[rank] = Identity.decode(record[_TOKEN_BYTES:], rank)
            if rank == 0:
                self.token = record[:_TOKEN_BYTES]
            if rank != self.rank:
                self.watch.watch(rank, found[rank].native())

        self._store.set(f"who/{self.rank}", self.token + self.identities[0].encode())
        try:
            self._wait({rank: f"who/{rank}" for rank in range(self.world_size)}, "start", welcome)
        except SidpError as error:
            # It may be this rank's own trouble, say no descriptor to watch a peer by: nobody else would tell.
            self.fail(error)
            raise
        self.identities = [found[rank] for rank in range(self.world_size)]

    def _wait(self, keys: dict[int, str], name: str, arrived: Callable[[int, bytes], None] | None = None) -> None:
        """Waits until all keys are there; raises as soon as it is known that they will not come.

        ``arrived(rank, value)`` is called for each key as it comes, so that its rank can be watched from then
        on.
        """
        end = time.monotonic() + self.timeout_s
        step, looks, missing = _FIRST_STEP_S, 0, dict(keys)
        while not self._complete(missing, arrived):
            self._raise_published()
            if self.watch.dead_rank() >= 0:
                # What a rank has published before its death counts.
                if self._complete(missing, arrived):
                    return
                self._raise_published()
                self.watch.check(f"the group was at '{name}'")
            looks += 1
            if looks % _LOOKS_PER_LEFT_CHECK == 0:
                self._raise_left(missing, name)
            if time.monotonic() >= end:
                self._raise_late(missing, name)
            time.sleep(step)
            step = min(step * 1.5, _LAST_STEP_S)

    def _complete(self, missing: dict[int, str], arrived: Callable[[int, bytes], None] | None) -> bool:
        if arrived is None:
            return self._store.check(list(missing.values()))
        for rank, key in list(missing.items()):
            if self._store.check([key]):
                arrived(rank, self._store.get(key))
                del missing[rank]
        return not missing

    def _unpack(self, frame: bytes, rank: int, name: str) -> bytes:
        """The payload of a rank's frame, every field checked."""
        if len(frame) < _FRAME.size or frame[:4] != _MAGIC:
            raise LayoutError(f"{name}: rank {rank} published {len(frame)} bytes that are no message of sidp")
        _, sender, name_length, token = _FRAME.unpack_from(frame)
        payload = frame[_FRAME.size + name_length :]
        if sender != rank or token != self.token or len(payload) > MAX_PAYLOAD_BYTES:
            raise LayoutError(f"{name}: the message of rank {rank} is from rank {sender} or from another job")
        theirs = frame[_FRAME.size : _FRAME.size + name_length].decode(errors="replace")
        if theirs != name:
            raise PeerError(
                f"this rank is at '{name}' while rank {rank} is at '{theirs}': all ranks must make the same "
                f"calls in the same order",
                rank,
            )
        return payload

    def _raise_published(self) -> None:
        if self._store.check(["failure"]):
            self._failure = _parse_failure(self._store.get("failure"), self.world_size)
            raise self._failure

    def _raise_left(self, missing: dict[int, str], name: str) -> None:
        for rank, key in missing.items():
            # In this order: a rank leaves after it has published, so a key missing even now will not come.
            if rank != self.rank and self._store.check([f"left/{rank}"]) and not self._store.check([key]):
                self._raise_published()
                raise PeerError(f"rank {rank} closed its pool while this rank was at '{name}'", rank)

    def _raise_late(self, missing: dict[int, str], name: str) -> NoReturn:
        late = [rank for rank, key in missing.items() if not self._store.check([key])]
        states = ", ".join(f"rank {rank} ({self._state(rank)})" for rank in late)
        raise PeerError(
            f"{states} did not come to '{name}' within {self.timeout_s:g} s: all ranks must make the same "
            f"calls in the same order; raise timeout_s if they need longer",
            late[0] if late else -1,
        )

    def _state(self, rank: int) -> str:
        state = self.watch.state(rank) if rank != self.rank else "this rank"
        return "not heard of" if state == "unknown" else state

    @contextlib.contextmanager
    def _naming_the_store(self, name: str):
        """A store that is gone is a peer that is gone: says which, as well as it can be known."""
        try:
            yield
        except StoreLost as lost:
            end = time.monotonic() + 0.5
            while self.watch.dead_rank() < 0 and time.monotonic() < end:
                time.sleep(0.01)
            self.watch.check(f"the group was at '{name}'")
            raise PeerError(
                f"the torch.distributed store does not answer at '{name}' ({lost}): it is hosted by global "
                f"rank 0 or by the launcher, which may have ended",
                self.global_ranks.index(0) if 0 in self.global_ranks else -1,
            ) from lost

    def _linger(self) -> None:
        end = time.monotonic() + min(_LINGER_S, self.timeout_s)
        waiting = set(range(self.world_size)) - {self.rank}
        while waiting and time.monotonic() < end:
            waiting = {rank for rank in waiting if self.watch.state(rank) not in ("dead", "unknown")}
            waiting = {rank for rank in waiting if not self._store.check([f"left/{rank}"])}
            time.sleep(_LAST_STEP_S if waiting else 0)

    def _end(self) -> None:
        self._closed = True
        self.watch.stop()
        if self._store is not None:
            self._store.close()

    def _in_child(self) -> bool:
        return os.getpid() != self._process

    def _check_usable(self, name: str) -> None:
        if self._in_child():
            raise PoolClosedError(f"'{name}' in a forked child: a pool belongs to the process that made it")
        if self._closed:
            raise PoolClosedError(f"'{name}' after close(): this pool has left its group")
        if self._failure is not None:
            raise self._failure


def _parse_failure(record: bytes, world_size: int) -> SidpError:
    try:
        notice = json.loads(record[: 8 * _MAX_TEXT])
        rank, peer, message = int(notice["rank"]), int(notice["peer"]), str(notice["message"])[:_MAX_TEXT]
        kind = _ERRORS[notice["type"]]
        if not 0 <= rank < world_size:
            raise ValueError(f"it names rank {str(rank)[:20]} of {world_size}")
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        return SidpError(f"a rank failed, and what it published cannot be read: {error}")
    text = f"rank {rank}: {message}"
    return PeerError(text, peer if 0 <= peer < world_size else rank) if kind is PeerError else kind(text)

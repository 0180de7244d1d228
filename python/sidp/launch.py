"""Start the ranks of a group on this machine, watch them, and bring their results back.

`sidp`'s own commands use this; a user's script keeps its own launcher (torchrun, Ray, an engine's).
torch is imported only in the ranks.
"""

from __future__ import annotations

import logging
import multiprocessing as mp
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from .errors import ConfigError, SidpError

logger = logging.getLogger(__name__)

_GRACE_S = 5.0  # between SIGTERM and SIGKILL for a rank that has to go
_ECHO_S = 1.0  # how long to listen for the first cause once one rank has failed


class RankFailed(SidpError):
    """A launched rank raised or died: `rank`, `reason` (one line), `detail` (its traceback or nothing)."""

    def __init__(self, rank: int, reason: str, detail: str = "") -> None:
        super().__init__(f"rank {rank} failed: {reason}; the other ranks were ended")
        self.rank = rank
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class RankContext:
    """What a rank's function is told about itself; `send` reports progress to the parent's `on_message`."""

    rank: int
    world_size: int
    threads: int
    send: Callable[[Any], None]


@dataclass(frozen=True)
class _Failure:
    """`when` is the system's monotonic clock at the raise; None for a rank that died without a word."""

    kind: str
    reason: str
    detail: str = ""
    when: float | None = None

    def rank_as_cause(self) -> tuple[int, float]:
        """Smaller is likelier to be the cause: a death, then the first error, then complaints about peers."""
        if self.when is None:
            return (0, 0.0)
        return (2 if self.kind == "PeerError" else 1, self.when)


@dataclass
class _Rank:
    rank: int
    process: mp.process.BaseProcess
    connection: Connection
    result: Any = None
    done: bool = False
    failure: _Failure | None = None
    open: bool = field(default=True)


def threads_per_rank(world_size: int) -> int:
    """The share of this process's cores that one of `world_size` ranks gets, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // world_size)


def launch(
    target: Callable[..., Any],
    world_size: int,
    args: tuple[Any, ...] = (),
    *,
    on_message: Callable[[int, Any], None] | None = None,
    timeout_s: float | None = None,
    survivors: bool = False,
) -> list[Any]:
    """Run `target(context, *args)` in `world_size` fresh processes joined in a gloo group; results by rank.

    `target` must be importable (it is pickled by name); arguments and results must pickle. A rank that
    raises or dies ends the others and raises `RankFailed`; with `survivors` the others go on to their own end, and
    the `RankFailed` stands in its place among the results. An interrupt of the parent ends every rank first.
    """
    if world_size < 1:
        raise ConfigError(f"world_size is {world_size}, expected at least 1; ask for one rank or more")
    scratch = tempfile.mkdtemp(prefix="sidp-launch-")
    ranks: list[_Rank] = []
    try:
        with _sigterm_as_exit():
            threads = threads_per_rank(world_size)
            with _environment(OMP_NUM_THREADS=str(threads)):
                for rank in range(world_size):
                    ranks.append(_start(rank, world_size, threads, scratch, target, args))
            _watch(ranks, on_message, None if timeout_s is None else time.monotonic() + timeout_s, survivors)
        return [rank.result if rank.failure is None else _failed(rank) for rank in ranks]
    finally:
        _end(ranks)
        shutil.rmtree(scratch, ignore_errors=True)


def _start(rank: int, world_size: int, threads: int, scratch: str, target, args) -> _Rank:
    context = mp.get_context("spawn")  # fork would copy the parent's threads' locks and any CUDA context
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_rank_main,
        name=f"sidp-rank-{rank}",
        args=(rank, world_size, threads, os.path.join(scratch, "rendezvous"), sender, target, args),
        daemon=True,
    )
    process.start()
    sender.close()  # so that the receiver sees the end of the file when the rank dies
    return _Rank(rank, process, receiver)


def _watch(ranks: list[_Rank], on_message, deadline: float | None, survivors: bool) -> None:
    while True:
        waiting = [rank for rank in ranks if rank.open]
        if not waiting:
            return
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait([rank.connection for rank in waiting], timeout=left)
        if not ready:
            late = [rank.rank for rank in waiting]
            raise RankFailed(late[0], f"no result within the time limit (ranks still at work: {late})")
        for rank in waiting:
            if rank.connection in ready:
                _receive(rank, on_message)
        if any(rank.failure for rank in ranks) and not survivors:
            raise _first_cause(ranks)


def _receive(rank: _Rank, on_message) -> None:
    try:
        kind, payload = rank.connection.recv()
    except (EOFError, OSError):
        rank.open = False
        if not rank.done and rank.failure is None:
            rank.process.join(_GRACE_S)
            rank.failure = _Failure("died", _how_it_died(rank.process.exitcode))
        return
    if kind == "result":
        rank.result, rank.done = payload, True
    elif kind == "error":
        rank.failure = _Failure(*payload)
    elif on_message is not None:
        on_message(rank.rank, payload)


def _how_it_died(exitcode: int | None) -> str:
    if exitcode is None:
        return "closed its connection without a result"
    if exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exited with code {exitcode} without a result"


def _first_cause(ranks: list[_Rank]) -> RankFailed:
    """The failure to show: a rank's own error before its peers' complaint that it is gone."""
    end = time.monotonic() + _ECHO_S
    while (left := end - time.monotonic()) > 0:
        waiting = [rank for rank in ranks if rank.open and rank.failure is None]
        ready = wait([rank.connection for rank in waiting], timeout=left) if waiting else []
        if not ready:
            break
        for rank in waiting:
            if rank.connection in ready:
                _receive(rank, None)
    failed = [rank for rank in ranks if rank.failure]
    return _failed(min(failed, key=lambda rank: rank.failure.rank_as_cause()))


def _failed(rank: _Rank) -> RankFailed:
    return RankFailed(rank.rank, rank.failure.reason, rank.failure.detail)


def _end(ranks: list[_Rank]) -> None:
    for rank in ranks:
        if rank.process.is_alive() and not rank.done:
            rank.process.terminate()
    end = time.monotonic() + _GRACE_S
    for rank in ranks:
        rank.process.join(max(0.1, end - time.monotonic()))
        if rank.process.is_alive():
            rank.process.kill()
            rank.process.join()
        rank.connection.close()


def _rank_main(rank, world_size, threads, rendezvous, sender, target, args) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells every process; the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    threading.Thread(target=_die_with_parent, daemon=True).start()
    lock = threading.Lock()

    def send(kind: str, payload: Any) -> None:
        with lock:
            sender.send((kind, payload))

    try:
        result = _run_in_group(
            RankContext(rank, world_size, threads, lambda m: send("message", m)), rendezvous, target, args
        )
        send("result", result)
    except Exception as error:
        when = time.monotonic()
        text = str(error).strip() or type(error).__name__
        reason = text if isinstance(error, SidpError) else f"{type(error).__name__}: {text}"
        send("error", (type(error).__name__, reason, traceback.format_exc(), when))
        sender.close()
        sys.exit(1)


def _run_in_group(context: RankContext, rendezvous: str, target, args) -> Any:
    import datetime

    import torch
    import torch.distributed as dist

    torch.set_num_threads(context.threads)
    rank, world_size = str(context.rank), str(context.world_size)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size)
    # A file needs no port; the pairs that gloo opens stay on the loopback interface.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=context.rank,
        world_size=context.world_size,
        timeout=datetime.timedelta(seconds=120),
    )
    try:
        return target(context, *args)
    finally:
        dist.destroy_process_group()


def _die_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)  # nobody is left to report to; sys.exit would only end this thread


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables for the processes started inside; libraries read them before any code of ours runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the parent, so that it ends its ranks; only the main thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

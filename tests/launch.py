"""Runs a function as the ranks of a process group, one process a rank, with a hard deadline.

    def body(ctx, extra):                       # module level, so that the children can import it
        ...
        return value                            # picklable

    values = parallel_launch(body, 4, "extra")  # one value a rank; RankFailed with every traceback

To watch the ranks, or to kill one in the middle, hold the launch:

    with start(body, 2) as ranks:
        ranks.wait_for("mapped")                # every rank has called ctx.say("mapped")
        ranks.kill(1)                           # SIGKILL, or kill(1, signal.SIGSTOP)
        ranks.tell("go")                        # ctx.hear("go") returns in every rank
        outcomes = ranks.join()                 # [Outcome, ...]: value or error, exit code; raises only
                                                # when a rank does not end within the deadline

`ctx.rank`, `ctx.world_size` and `ctx.tmp` (a directory all ranks share) are there for the body. The default
process group is gloo over the loopback, rendezvous by a TCPStore that rank 0 hosts (`rendezvous="tcp"`), by a
file (`"file"`), or none at all (`"none"`: no torch import). The children start from a fork server that has
imported torch once, so a launch costs tens of milliseconds; SIDP_TEST_START=spawn gives fresh interpreters
instead. The caller's environment is copied into the children at the launch (so monkeypatch.setenv works);
stdout and stderr are inherited.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_START = os.environ.get("SIDP_TEST_START", "forkserver")
_processes = multiprocessing.get_context(_START)
if _START == "forkserver":
    _processes.set_forkserver_preload(["torch", "torch.distributed"])


@dataclass
class Outcome:
    """How one rank ended. `error` is the exception's class name, "" where none; `exitcode` -signal if
    killed."""

    rank: int
    value: Any = None
    error: str = ""
    message: str = ""
    traceback: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)  # the exception's plain ones, e.g. rank
    exitcode: int | None = None
    finished: bool = False  # the body returned or raised; False where the process died before
    ended: float = 0.0  # time.time() when it was heard of


class RankFailed(AssertionError):
    """Some rank raised, died or ran out of time. `outcomes` has them all."""

    def __init__(self, message: str, outcomes: list[Outcome]):
        super().__init__(message)
        self.outcomes = outcomes


class Context:
    """What a body sees of its launch."""

    def __init__(self, rank: int, world_size: int, tmp: Path, pipe: Connection):
        self.rank = rank
        self.world_size = world_size
        self.tmp = tmp
        self._pipe = pipe
        self._heard: dict[str, Any] = {}

    def say(self, word: str, value: Any = None) -> None:
        """Tells the test that this rank has come to `word`."""
        self._pipe.send(("say", word, value))

    def hear(self, word: str, timeout: float = 60.0) -> Any:
        """Waits until the test has told `word` and returns the value told with it."""
        end = time.monotonic() + timeout
        while word not in self._heard:
            if not self._pipe.poll(max(0.0, end - time.monotonic())):
                raise TimeoutError(f"the test has not told {word!r} within {timeout} s")
            told, value = self._pipe.recv()
            self._heard[told] = value
        return self._heard[word]


def _join_group(ctx: Context, rendezvous: str, backend: str, timeout: float) -> None:
    import datetime

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    if rendezvous == "file":
        store = dist.FileStore(str(ctx.tmp / "rendezvous"), ctx.world_size)
    elif ctx.rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, ctx.world_size, True, timeout=limit, wait_for_workers=False)
        ctx.say("_port", store.port)
    else:
        port = ctx.hear("_port", timeout)
        store = dist.TCPStore("127.0.0.1", port, ctx.world_size, False, timeout=limit, wait_for_workers=False)
    dist.init_process_group(backend, store=store, rank=ctx.rank, world_size=ctx.world_size, timeout=limit)


def _leave_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _plain_attributes(error: BaseException) -> dict[str, Any]:
    return {k: v for k, v in vars(error).items() if isinstance(v, (int, float, str, bool, type(None)))}


def _rank_main(body, rank, world_size, tmp, pipe, env, rendezvous, backend, timeout, args, kwargs) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    stacks = open(Path(tmp) / f"stacks.{rank}", "w")  # noqa: SIM115 (must stay open for the signal handler)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    ctx = Context(rank, world_size, Path(tmp), pipe)
    failed = False
    try:
        if rendezvous != "none":
            _join_group(ctx, rendezvous, backend, timeout)
        pipe.send(("value", body(ctx, *args, **kwargs)))
    except BaseException as error:  # SystemExit too: the test wants to know
        failed = True
        pipe.send(("error", type(error).__name__, str(error), traceback.format_exc(), _plain_attributes(error)))
    if not failed and rendezvous != "none":
        # The store lives in rank 0, so nobody leaves before all are done.
        ctx.hear("_leave", timeout)
        _leave_group()
    sys.stdout.flush()
    sys.stderr.flush()
    if failed:
        os._exit(1)  # a group whose other ranks are gone may not be waited for in a destructor


class Launch:
    """The running ranks of one start(). Leaving the `with` block kills what still runs."""

    def __init__(self, body, world_size, args, kwargs, timeout, rendezvous, backend):
        self.world_size = world_size
        self._end = time.monotonic() + timeout
        self._tmp = Path(tempfile.mkdtemp(prefix="sidp-test-"))
        self._said: list[dict[str, Any]] = [{} for _ in range(world_size)]
        self._outcomes = [Outcome(rank) for rank in range(world_size)]
        self._pipes: list[Connection] = []
        self._open: set[int] = set(range(world_size))
        self._left = False
        self.processes = []
        env = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME=os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
        for rank in range(world_size):
            here, there = _processes.Pipe()
            process = _processes.Process(
                target=_rank_main,
                name=f"rank{rank}",
                args=(
                    body,
                    rank,
                    world_size,
                    str(self._tmp),
                    there,
                    env,
                    rendezvous,
                    backend,
                    timeout,
                    args,
                    kwargs,
                ),
            )
            process.start()
            there.close()
            self.processes.append(process)
            self._pipes.append(here)

    # -- what a test does with running ranks ----------------------------------------------------------------

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def kill(self, rank: int, sig: int = signal.SIGKILL) -> None:
        os.kill(self.processes[rank].pid, sig)

    def tell(self, word: str, value: Any = None, ranks: list[int] | None = None) -> None:
        for rank in range(self.world_size) if ranks is None else ranks:
            with contextlib.suppress(OSError):  # that rank is gone; its outcome says so
                self._pipes[rank].send((word, value))

    def wait_for(self, word: str, ranks: list[int] | None = None) -> list[Any]:
        """Waits until these ranks (default: all) have said `word`; their values. RankFailed if one ends
        first."""
        wanted = list(range(self.world_size)) if ranks is None else ranks
        while not all(word in self._said[rank] for rank in wanted):
            for rank in wanted:
                if word not in self._said[rank] and (rank not in self._open or self._outcomes[rank].finished):
                    self._fail(f"rank {rank} ended before it said {word!r}")
            if not self._pump():
                self._fail(f"out of time while waiting for {word!r}")
        return [self._said[rank][word] for rank in wanted]

    def join(self) -> list[Outcome]:
        """Waits until every rank has ended (killing them at the deadline) and returns how each did."""
        while not self._all_ended() and self._pump():
            pass
        if not self._all_ended():
            self._fail("out of time")
        self._release()
        for rank, process in enumerate(self.processes):
            process.join(max(0.1, self._end - time.monotonic()))
            if process.exitcode is None:
                self._fail(f"rank {rank} returned but its process does not end")
            self._outcomes[rank].exitcode = process.exitcode
        return self._outcomes

    # -- inside ---------------------------------------------------------------------------------------------

    def _all_ended(self) -> bool:
        return all(out.finished or rank not in self._open for rank, out in enumerate(self._outcomes))

    def _release(self) -> None:
        if not self._left:
            self._left = True
            self.tell("_leave")

    def _pump(self) -> bool:
        """Takes in what the ranks send; False when the deadline has passed."""
        left = self._end - time.monotonic()
        if left <= 0:
            return False
        by_pipe = {self._pipes[rank]: rank for rank in self._open}
        for pipe in wait(list(by_pipe), timeout=left):
            rank = by_pipe[pipe]
            try:
                self._take(rank, pipe.recv())
            except (EOFError, OSError):
                self._open.discard(rank)
        return True

    def _take(self, rank: int, message: tuple) -> None:
        out = self._outcomes[rank]
        if message[0] == "say":
            self._said[rank][message[1]] = message[2]
            if message[1] == "_port":
                self.tell("_port", message[2])
        elif message[0] == "value":
            out.finished, out.ended, out.value = True, time.time(), message[1]
        else:
            out.finished, out.ended = True, time.time()
            out.error, out.message, out.traceback, out.attributes = message[1:]

    def _fail(self, why: str) -> None:
        stacks = self._stop()
        raise RankFailed("\n".join([why, *stacks, _describe(self._outcomes)]), self._outcomes)

    def _stop(self) -> list[str]:
        """Kills what still runs; first asks it where it is, and returns that."""
        running = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        hung = [rank for rank in running if not self._outcomes[rank].finished]
        for rank in hung:
            self.kill(rank, signal.SIGUSR1)
        if hung:
            time.sleep(0.3)
        for rank in running:
            self.processes[rank].kill()
            self.processes[rank].join(10)
        for rank, process in enumerate(self.processes):
            self._outcomes[rank].exitcode = process.exitcode
        paths = [(rank, self._tmp / f"stacks.{rank}") for rank in hung]
        return [f"--- rank {rank} was at\n{path.read_text()}" for rank, path in paths if path.exists()]

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._release()
        for process in self.processes:
            process.join(0 if not self._all_ended() else 5)
        self._stop()
        for pipe in self._pipes:
            pipe.close()
        shutil.rmtree(self._tmp, ignore_errors=True)


def _describe(outcomes: list[Outcome]) -> str:
    lines = []
    for out in outcomes:
        state = out.error or ("returned" if out.finished else "did not end by itself")
        lines.append(f"rank {out.rank}: {state} {out.message} (exit code {out.exitcode})\n{out.traceback}")
    return "\n".join(lines)


def start(
    body: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    rendezvous: str = "tcp",
    backend: str = "gloo",
    **kwargs: Any,
) -> Launch:
    """Starts `body(ctx, *args, **kwargs)` in `world_size` processes; use as a context manager."""
    return Launch(body, world_size, args, kwargs, timeout, rendezvous, backend)


def parallel_launch(
    body: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    rendezvous: str = "tcp",
    backend: str = "gloo",
    **kwargs: Any,
) -> list[Any]:
    """Runs `body(ctx, *args, **kwargs)` on every rank and returns the values; RankFailed if any failed."""
    with start(body, world_size, *args, timeout=timeout, rendezvous=rendezvous, backend=backend, **kwargs) as ranks:
        outcomes = ranks.join()
    if any(out.error or not out.finished for out in outcomes):
        raise RankFailed(_describe(outcomes), outcomes)
    return [out.value for out in outcomes]


def ranks_of(process):
    """Pids of the launcher's ranks, in the order of their start."""
    out = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout
    return sorted(int(line.split()[0]) for line in out.splitlines() if "spawn_main" in line)

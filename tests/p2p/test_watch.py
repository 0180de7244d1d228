"""Liveness: who is alive, stopped, closed or dead, by pidfd and by heartbeat."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time

import pytest

from launch import parallel_launch, start
from sidp._native import C
from sidp.errors import ConfigError, PeerError, PoolClosedError

TOKEN = bytes(16)
PATIENCE_S = 20.0


def until(condition, patience_s=PATIENCE_S):
    """Waits until `condition()` holds; returns its value."""
    end = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {patience_s} s"
        time.sleep(0.005)
    return value


def identity_of(pid):
    own = C.ProcessIdentity.current()
    with open(f"/proc/{pid}/stat") as file:
        started = int(file.read().rsplit(")", 1)[1].split()[19])
    return C.ProcessIdentity(pid, started, own.boot_id, own.pid_namespace, own.uid)


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def watch():
    watch = C.PeerWatch(0, 3, beat_ms=20, stale_beats=10)
    yield watch
    watch.stop()


def test_own_identity_is_what_the_kernel_says():
    own, same = C.ProcessIdentity.current(), identity_of(os.getpid())
    assert (own.pid, own.start_time, own.uid) == (os.getpid(), same.start_time, os.geteuid())
    assert own.pid_namespace == os.stat("/proc/self/ns/pid").st_ino and len(own.boot_id) == 32


def test_a_kill_is_seen_and_named(watch, sleeper):
    word = ctypes.c_int.from_address(watch.dead_word)
    watch.watch(2, identity_of(sleeper.pid))
    watch.check("waiting")
    assert watch.state(2) == "alive" and watch.state(1) == "unknown" and word.value == -1
    sleeper.kill()  # not reaped: a zombie counts as dead
    until(lambda: watch.dead_rank() >= 0)
    assert word.value == 2 and watch.state(2) == "dead"
    with pytest.raises(PeerError, match=rf"rank 2 \(pid {sleeper.pid}\) died while fetching layer 3") as caught:
        watch.check("fetching layer 3")
    assert caught.value.rank == 2


def test_a_recycled_pid_is_not_the_peer(watch, sleeper):
    now = identity_of(sleeper.pid)
    before = C.ProcessIdentity(now.pid, now.start_time - 1, now.boot_id, now.pid_namespace, now.uid)
    watch.watch(1, before)
    assert watch.dead_rank() == 1


def test_a_pid_that_is_gone_is_dead(watch):
    process = subprocess.Popen(["sleep", "600"])
    identity = identity_of(process.pid)
    process.kill()
    process.wait()
    watch.watch(1, identity)
    assert watch.dead_rank() == 1


def test_the_first_death_stays(watch):
    first, second = (subprocess.Popen(["sleep", "600"]) for _ in range(2))
    watch.watch(1, identity_of(first.pid))
    watch.watch(2, identity_of(second.pid))
    second.kill()
    until(lambda: watch.state(2) == "dead")
    first.kill()
    until(lambda: watch.state(1) == "dead")
    assert watch.dead_rank() == 2
    for process in (first, second):
        process.wait()


def test_arguments_and_ends(watch):
    identity = C.ProcessIdentity.current()
    for peer in (0, 3, -1):
        with pytest.raises(ConfigError, match="must be another rank"):
            watch.watch(peer, identity)
    with pytest.raises(ConfigError, match="outside of world size"):
        C.PeerWatch(3, 3)
    with pytest.raises(ConfigError, match="must be positive"):
        C.PeerWatch(0, 1, beat_ms=0)
    watch.stop()
    watch.stop()
    assert watch.dead_rank() == -1


def test_a_forked_child_leaves_it_alone(watch, sleeper):
    watch.watch(1, identity_of(sleeper.pid))
    arena = C.ShmArena(rank=0, world_size=3, token=TOKEN, extent_bytes=8, kind="named")
    watch.attach_own(arena)
    name = [entry for entry in os.listdir("/dev/shm") if f".{os.getpid()}." in entry]
    child = os.fork()
    if child == 0:
        try:
            watch.check("working")
        except PoolClosedError as error:
            refused = "forked child" in str(error)
        try:
            arena.set_phase("failed")
        except PoolClosedError:
            watch.stop()
            arena.close()
            os._exit(7 if refused else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert arena.phase == "created"
    assert len(name) == 1 and name[0] in os.listdir("/dev/shm")
    watch.check("working")
    watch.detach()
    arena.close()
    assert name[0] not in os.listdir("/dev/shm")


def _rank(ctx, pidfd, end):
    """Maps everyone and watches; rank 1 ends as the test wants, the others say what they see."""
    from sidp.control import ControlPlane

    plane = ControlPlane(None, 30.0)
    watch = C.PeerWatch(ctx.rank, ctx.world_size, beat_ms=20, stale_beats=20, pidfd=pidfd)
    arena = C.ShmArena(ctx.rank, ctx.world_size, plane.token, 4096)
    watch.attach_own(arena)
    mappings = []
    for rank, handle in enumerate(plane.exchange("arena", arena.handle())):
        if rank != ctx.rank:
            mappings.append(C.PeerMapping(handle, rank, ctx.world_size, plane.token, 4096))
            watch.watch(rank, plane.identities[rank].native())
            watch.attach(mappings[-1])
    plane.barrier("mapped")
    arena.unlink()
    ctx.say("mapped")
    ctx.hear("go")
    if ctx.rank == 1:
        if end == "close":
            arena.set_phase("finished")
            arena.set_phase("closed")
        elif end == "finish":
            arena.set_phase("finished")
        elif end == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1.0)
            return
        elif end == "hang":
            time.sleep(600)
        os._exit(0)
    final = {"close": "closed", "stop": "stalled" if pidfd else "dead"}.get(end, "dead")
    ctx.say("watching", time.monotonic())
    until(lambda: watch.state(1) == final)
    seen = time.monotonic()
    states = [watch.state(rank) for rank in range(ctx.world_size) if rank not in (1, ctx.rank)]
    result = watch.dead_rank(), states, seen
    ctx.say("seen")
    ctx.hear("depart")
    return result


@pytest.mark.parametrize("pidfd", [True, False], ids=["pidfd", "heartbeat"])
@pytest.mark.parametrize("end", ["kill", "close", "finish", "stop"])
def test_how_a_peer_ends_is_told_apart(pidfd, end):
    with start(_rank, 3, pidfd, "hang" if end == "kill" else end, timeout=15) as ranks:
        ranks.wait_for("mapped")
        ranks.tell("go")
        ranks.wait_for("watching", [0, 2])
        killed = time.monotonic()
        if end == "kill":
            ranks.kill(1)
        ranks.wait_for("seen", [0, 2])
        ranks.tell("depart")
        if end == "stop":
            ranks.kill(1, signal.SIGCONT)
        outcomes = ranks.join()
    dead = -1 if end == "close" or (end == "stop" and pidfd) else 1
    for rank in (0, 2):
        assert outcomes[rank].value[:2] == (dead, ["alive"])
        assert outcomes[rank].value[2] - killed < 5.0


def _write_into_extents(ctx):
    """A peer's write into another rank's weights must not reach them."""
    arena = C.ShmArena(0, 1, TOKEN, 4096)
    mapping = C.PeerMapping(arena.handle(), 0, 1, TOKEN, 4096)
    child = os.fork()
    if child == 0:
        ctypes.memset(mapping.extents, 1, 1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, ctypes.string_at(arena.extents, 1)


def test_weights_of_a_peer_are_read_only():
    assert parallel_launch(_write_into_extents, 1, rendezvous="none") == [(-signal.SIGSEGV, b"\0")]

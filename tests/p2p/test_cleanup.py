"""Nothing stays in /dev/shm, whoever is killed and whenever; and how the kind of sharing is chosen."""

from __future__ import annotations

import ctypes
import os
import time

import pytest

from launch import parallel_launch, start

EXTENT_BYTES = 3 << 20
# The steps of a connection, in order; a test kills ranks that have come to one of them.
STEPS = ["met", "made", "published", "mapped", "unlinked", "finished"]


def left_behind():
    return [name for name in os.listdir("/dev/shm") if name.startswith("sidp.")]


@pytest.fixture(autouse=True)
def clean():
    assert left_behind() == []
    yield
    for name in left_behind():
        os.unlink(f"/dev/shm/{name}")


def _connect(ctx, kind, stop_at, stops, cleanup=True):
    """Goes through the steps; the ranks in `stops` stay at `stop_at` until they are killed."""
    from sidp._native import C
    from sidp.control import ControlPlane
    from sidp.errors import PeerError

    plane = ControlPlane(None, 60.0)
    arena = None

    def step(name):
        ctx.say(name)
        if name == stop_at:
            if ctx.rank in stops:
                time.sleep(600)
            ctx.hear("go on")

    try:
        step("met")
        arena = C.ShmArena(ctx.rank, ctx.world_size, plane.token, EXTENT_BYTES, kind=kind)
        ctypes.memset(arena.extents, ctx.rank + 1, EXTENT_BYTES)
        step("made")
        plane.watch.attach_own(arena)
        handles = plane.exchange("arena", arena.handle())
        step("published")
        mappings = []
        for rank, handle in enumerate(handles):
            if rank != ctx.rank:
                mappings.append(C.PeerMapping(handle, rank, ctx.world_size, plane.token, EXTENT_BYTES))
                plane.watch.attach(mappings[-1])
        plane.barrier("mapped")
        step("mapped")
        arena.unlink()
        plane.barrier("unlinked")
        step("unlinked")
        seen = [ctypes.string_at(mapping.extents + EXTENT_BYTES - 1, 1)[0] - 1 for mapping in mappings]
        arena.set_phase("finished")
        step("finished")
        end = time.monotonic() + 10
        while stop_at in ("unlinked", "finished") and time.monotonic() < end:
            plane.watch.check("serving")
            time.sleep(0.01)
        return seen
    except PeerError as error:
        error = plane.first_cause(error)  # as a pool does: a rank that is late finds those gone that were not
        plane.fail(error)
        return error.rank, str(error)
    finally:
        plane.watch.detach()
        if arena is not None:
            arena.close()
        if cleanup:
            C.sweep_names()
        plane.close()


@pytest.mark.parametrize("kind", ["memfd", "named"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bytes_arrive_and_nothing_stays(world_size, kind):
    values = parallel_launch(_connect, world_size, kind, None, ())
    assert values == [[other for other in range(world_size) if other != rank] for rank in range(world_size)]
    assert left_behind() == []


@pytest.mark.parametrize("kind", ["memfd", "named"])
@pytest.mark.parametrize("step", STEPS)
def test_one_is_killed(step, kind):
    world_size, victim = 3, 1
    with start(_connect, world_size, kind, step, (victim,)) as ranks:
        ranks.wait_for(step)
        ranks.kill(victim)
        ranks.tell("go on")
        outcomes = ranks.join()
        left = left_behind()  # before the launch ends what may still run
    for rank in (0, 2):
        assert outcomes[rank].value[0] == victim, outcomes[rank]
        assert f"rank {victim} " in outcomes[rank].value[1]
    assert left == []


@pytest.mark.parametrize("step", STEPS)
def test_all_are_killed(step):
    with start(_connect, 2, "memfd", step, (0, 1)) as ranks:
        ranks.wait_for(step)
        ranks.kill(0)
        ranks.kill(1)
        ranks.join()
    assert left_behind() == []


def _make_one(ctx):
    from sidp._native import C

    arena = C.ShmArena(0, 1, bytes(16), 4096, kind="named")
    owners = [int(name.split(".")[3]) for name in left_behind()]
    arena.close()
    return owners == [os.getpid()]


def test_named_files_of_ranks_that_all_were_killed_go_with_the_next_arena():
    with start(_connect, 2, "named", "published", (0, 1)) as ranks:
        ranks.wait_for("published")
        assert len(left_behind()) == 2
        ranks.kill(0)
        ranks.kill(1)
        ranks.join()
    assert len(left_behind()) == 2  # the one hole of this kind
    assert parallel_launch(_make_one, 1, rendezvous="none") == [True]
    assert left_behind() == []


def _choose(ctx, hidden):
    from sidp.control import ControlPlane
    from sidp.probe import choose_shm_kind

    plane = ControlPlane(None, 30.0)
    if ctx.rank in hidden:
        PR_SET_DUMPABLE = 4
        assert ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0
        if os.geteuid() == 0:
            # Root opens everything unless it gives that up too.
            libc = ctypes.CDLL(None, use_errno=True)
            os.setresuid(65534, 65534, 65534)
            assert libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0
    choice = choose_shm_kind(plane)
    plane.close()
    return choice


@pytest.mark.parametrize("world_size", [2, 4])
def test_memfd_is_the_choice_where_it_works(world_size):
    assert parallel_launch(_choose, world_size, ()) == [("memfd", "")] * world_size


def test_one_wish_for_named_is_all_ranks_choice(monkeypatch):
    monkeypatch.setenv("SIDP_SHM_KIND", "named")
    assert parallel_launch(_choose, 2, ()) == [("named", "rank 0: SIDP_SHM_KIND=named")] * 2


def test_where_one_rank_cannot_open_all_take_named():
    first, second = parallel_launch(_choose, 2, (1,))
    assert first == second
    assert first[0] == "named" and first[1].startswith("rank ")


def _bad_wish(ctx):
    from sidp.control import ControlPlane
    from sidp.errors import ConfigError
    from sidp.probe import choose_shm_kind

    with pytest.raises(ConfigError, match="SIDP_SHM_KIND='tape'"):
        choose_shm_kind(ControlPlane(None, 5.0))


def test_a_wrong_wish_is_refused(monkeypatch):
    monkeypatch.setenv("SIDP_SHM_KIND", "tape")
    parallel_launch(_bad_wish, 1, rendezvous="none")

"""The control plane across processes: bytes, failures, deaths, a lost store."""

from __future__ import annotations

import os
import signal
import time

import pytest

from launch import parallel_launch, start

WORLDS = [1, 2, 4]
DEATH_S = 5.0  # what the library promises


def _plane(timeout_s=30.0, group=None):
    from sidp.control import ControlPlane

    return ControlPlane(group, timeout_s)


def _exchange(ctx):
    plane = _plane()
    payload = bytes([ctx.rank]) * ctx.rank + b"\x00\xff"
    got = [plane.exchange("hello", payload), plane.exchange("again", b""), plane.exchange("big", bytes(1 << 20))]
    plane.barrier("done")
    where = (plane.rank, plane.world_size, plane.token, [identity.pid for identity in plane.identities])
    plane.require_one_host()
    plane.close()
    plane.close()
    return got[0], got[1], [len(x) for x in got[2]], where, os.getpid()


@pytest.mark.parametrize("rendezvous", ["tcp", "file"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_everyone_gets_everyones_bytes(world_size, rendezvous):
    values = parallel_launch(_exchange, world_size, rendezvous=rendezvous)
    for rank, (hello, again, big, where, _) in enumerate(values):
        assert hello == [bytes([r]) * r + b"\x00\xff" for r in range(world_size)]
        assert again == [b""] * world_size and big == [1 << 20] * world_size
        assert where == (rank, world_size, values[0][3][2], [value[4] for value in values])


def _alone(ctx):
    plane = _plane()
    return plane.world_size, plane.exchange("x", b"y")


def test_without_torch_distributed_the_group_is_one():
    assert parallel_launch(_alone, 1, rendezvous="none") == [(1, [b"y"])]


def _subgroups(ctx):
    import torch.distributed as dist

    low, high = dist.new_group([0, 1]), dist.new_group([3, 2])
    mine = low if ctx.rank < 2 else high
    first, second = _plane(group=mine), _plane(group=mine)
    names = [plane.exchange("who", f"{ctx.rank}{tag}".encode()) for plane, tag in ((second, "b"), (first, "a"))]
    tokens = first.token, second.token
    from sidp.errors import ConfigError

    with pytest.raises(ConfigError, match=r"is not in the given group|no process group"):
        _plane(group=high if ctx.rank < 2 else low)
    first.close()
    second.close()
    return first.rank, names, tokens


def test_subgroups_and_pools_of_one_group_do_not_mix():
    values = parallel_launch(_subgroups, 4)
    assert [value[0] for value in values] == [0, 1, 0, 1]
    assert values[1][1] == [[b"0b", b"1b"], [b"0a", b"1a"]]
    assert values[3][1] == [[b"2b", b"3b"], [b"2a", b"3a"]]
    assert len({token for value in values for token in value[2]}) == 4


def _fail_on(ctx, failing, kind):
    import sidp.errors as errors

    plane = _plane(timeout_s=60.0)
    plane.barrier("first")
    if ctx.rank == failing:
        error = ValueError("odd") if kind == "ValueError" else getattr(errors, kind)("the value is 7, expected 8")
        plane.fail(error)
        plane.close()
        return None
    begin = time.monotonic()
    texts = []
    for name in ("second", "third"):  # it stays failed
        try:
            plane.exchange(name)
        except errors.SidpError as error:
            texts.append((type(error).__name__, str(error), getattr(error, "rank", None)))
            plane.fail(error)  # as a pool does; must not hide the first cause
    plane.close()
    return texts, time.monotonic() - begin


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("kind", ["ConfigError", "LayoutError", "PeerError", "ValueError"])
def test_a_published_failure_is_raised_by_all(failing, kind):
    values = parallel_launch(_fail_on, 3, failing, kind)
    for rank, value in enumerate(values):
        if rank == failing:
            continue
        expected = kind if kind != "ValueError" else "SidpError"
        text = f"rank {failing}: " + ("ValueError: odd" if kind == "ValueError" else "the value is 7, expected 8")
        peer = failing if kind == "PeerError" else None
        assert value[0] == [(expected, text, peer)] * 2


def _die_before(ctx, victim, name, sig):
    """Everyone but `victim` waits at `name`; the test kills the victim."""
    from sidp.errors import PeerError

    plane = _plane(timeout_s=60.0)
    ctx.say("met")
    if ctx.rank == victim:
        time.sleep(600)
    ctx.say("waiting")
    try:
        plane.exchange(name)
    except PeerError as error:
        return error.rank, str(error), time.monotonic()
    finally:
        plane.close()


@pytest.mark.parametrize("rendezvous", ["tcp", "file"])
@pytest.mark.parametrize(("world_size", "victim"), [(2, 1), (4, 2), (2, 0), (4, 0)])
def test_a_killed_rank_is_named(world_size, victim, rendezvous):
    with start(_die_before, world_size, victim, "handles", signal.SIGKILL, rendezvous=rendezvous) as ranks:
        ranks.wait_for("met")
        ranks.wait_for("waiting", [rank for rank in range(world_size) if rank != victim])
        killed = time.monotonic()
        ranks.kill(victim)
        outcomes = ranks.join()
    for outcome in outcomes:
        if outcome.rank != victim:
            rank, text, seen = outcome.value
            assert rank == victim
            assert f"rank {victim} (pid " in text and "'handles'" in text
            assert seen - killed < DEATH_S


def _late(ctx, victim):
    from sidp.errors import PeerError

    plane = _plane(timeout_s=2.0)
    ctx.say("met")
    ctx.hear("go")
    if ctx.rank == victim:
        os.kill(os.getpid(), signal.SIGSTOP)
        return None
    try:
        plane.exchange("late")
    except PeerError as error:
        return error.rank, str(error), plane.watch.state(victim)
    finally:
        ctx.say("raised")
        plane.close()


@pytest.mark.parametrize("victim", [1, 0])
def test_a_stopped_rank_is_late_not_dead(victim):
    # Rank 0 hosts the store: when that one is stopped, the store itself does not answer.
    with start(_late, 2, victim) as ranks:
        ranks.wait_for("met")
        ranks.tell("go")
        ranks.wait_for("raised", [1 - victim])
        ranks.kill(victim, signal.SIGCONT)
        outcomes = ranks.join()
    rank, text, state = outcomes[1 - victim].value
    assert rank == victim and state == "alive"
    expected = r"rank 1 (alive) did not come to 'late'" if victim == 1 else "no answer within 2 s"
    assert expected in text


def _never_comes(ctx):
    from sidp.errors import PeerError

    if ctx.rank == 1:
        ctx.hear("leave early")
        return None
    try:
        _plane(timeout_s=1.0)
    except PeerError as error:
        ctx.say("raised")
        return error.rank, str(error)


def test_a_rank_that_makes_no_pool_is_named():
    with start(_never_comes, 2) as ranks:
        ranks.wait_for("raised", [0])
        ranks.tell("leave early")
        rank, text = ranks.join()[0].value
    assert rank == 1 and "rank 1 (not heard of) did not come to 'start' within 1 s" in text


def _different_order(ctx):
    from sidp.errors import PeerError

    plane = _plane()
    try:
        plane.exchange("commit" if ctx.rank == 0 else "close")
    except PeerError as error:
        return error.rank, str(error)
    finally:
        plane.close()


def test_ranks_at_different_calls_hear_it_at_once():
    values = parallel_launch(_different_order, 2)
    assert values[0][0] == 1 and "at 'commit' while rank 1 is at 'close'" in values[0][1]
    assert values[1][0] == 0 and "at 'close' while rank 0 is at 'commit'" in values[1][1]


def _leaves(ctx):
    from sidp.errors import PeerError

    plane = _plane(timeout_s=60.0)
    if ctx.rank == 1:
        plane.close()
        ctx.hear("go")
        return None
    try:
        plane.exchange("commit")
    except PeerError as error:
        ctx.say("raised")
        return error.rank, str(error)
    finally:
        plane.close()


def test_a_rank_that_closed_is_not_waited_for():
    with start(_leaves, 2) as ranks:
        ranks.wait_for("raised", [0])
        ranks.tell("go")
        rank, text = ranks.join()[0].value
    assert rank == 1 and "rank 1 closed its pool while this rank was at 'commit'" in text


def _misuse(ctx):
    from sidp.control import MAX_PAYLOAD_BYTES, ControlPlane
    from sidp.errors import ConfigError, PoolClosedError

    with pytest.raises(ConfigError, match="timeout_s must be positive, got 0"):
        ControlPlane(None, 0)
    with pytest.raises(ConfigError, match="not initialised"):
        ControlPlane(object(), 1)
    plane = _plane()
    with pytest.raises(ConfigError, match="at most"):
        plane.exchange("large", bytes(MAX_PAYLOAD_BYTES + 1))
    child = os.fork()
    if child == 0:
        try:
            plane.exchange("x")
        except PoolClosedError:
            plane.close()
            os._exit(7)
        os._exit(8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert plane.exchange("x") == [b""]
    plane.close()
    with pytest.raises(PoolClosedError, match="after close"):
        plane.exchange("x")


def test_misuse_is_refused():
    parallel_launch(_misuse, 1, rendezvous="none")


def _forged(ctx, key, value):
    """Rank 1 writes what no honest rank would."""
    import torch.distributed as dist

    from sidp.errors import SidpError

    store = dist.PrefixStore("sidp/0-1/1/", dist.distributed_c10d._get_default_store())
    if ctx.rank == 1:
        store.set("who/1", value) if key == "who/1" else _plane()
        store.set(key, value)
        ctx.hear("go")
        return None
    try:
        plane = _plane(timeout_s=10)
        plane.exchange("x")
    except SidpError as error:
        return type(error).__name__, str(error)
    finally:
        ctx.say("raised")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("who/1", bytes(16) + b"{}", "no valid identity"),
        ("who/1", b"short", "no valid identity"),
        ("who/1", bytes(16) + b'{"pid": "7"}', "no valid identity"),
        ("0/1", b"junk", "no message of sidp"),
        ("0/1", b"SDP1" + bytes(60), "another job"),
        ("failure", b"\x80\x04N.", "cannot be read"),
        ("failure", b'{"type": "SystemExit", "message": "", "rank": 1, "peer": -1}', "cannot be read"),
    ],
)
def test_what_a_peer_publishes_is_checked(key, value, reason):
    with start(_forged, 2, key, value) as ranks:
        ranks.wait_for("raised", [0])
        ranks.tell("go")
        outcome = ranks.join()[0]
    assert outcome.value is not None and reason in outcome.value[1]

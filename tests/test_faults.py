"""Deaths and failures in every phase: the others raise PeerError naming the rank within seconds, and nothing is left."""

import os
import signal
import time

import pytest
import torch
from weights import load_all

from launch import parallel_launch, start
from sidp import FFNSpec, PeerError, PoolClosedError, PoolConfig, WeightPool, ffn_forward

pytestmark = pytest.mark.usefixtures("nothing_left_in_shared_memory")

SPEC = FFNSpec(32, 96, dtype=torch.float32)
LAYERS = 8
# Well within the pools' own timeout. The contract says 5 s, and it takes milliseconds (docs/faults.md); but a machine that runs
# tests may stand still for longer than that.
SEEN_WITHIN_S = 20.0


def body_dies_in(ctx, phase, victim):
    """The victim stops for ever in `phase`; the rest goes on until it is stopped by an error."""
    pool = WeightPool([SPEC] * LAYERS, config=PoolConfig(timeout_s=30))
    try:
        if phase == "before load":
            stay(ctx, victim)
        load_all(pool)
        if phase == "before commit":
            stay(ctx, victim)
        pool.commit()
        if phase == "after commit":
            stay(ctx, victim)
        x = torch.randn(2, 32)
        for use in range(1_000_000):
            layer = use % LAYERS
            if phase == "in use" and use == 3 * LAYERS:
                pool.acquire(layer)
                stay(ctx, victim)
                pool.release(layer)
            ffn_forward(x, pool, layer)
    except PeerError as error:
        seen = time.monotonic()
        pool.close()
        return error.rank, str(error), seen, time.monotonic() - seen
    return None


def stay(ctx, victim):
    if ctx.rank == victim:
        ctx.say("here")
        time.sleep(60)


def body_fails_after_a_death(ctx, victim):
    with WeightPool([SPEC] * LAYERS, config=PoolConfig(timeout_s=30)) as pool:
        load_all(pool)
        pool.commit()
        if ctx.rank == victim:
            stay(ctx, victim)
        ctx.say("here")
        ctx.hear("go")
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.skipif(not hasattr(BaseException, "add_note"), reason="Python 3.10 has no notes on exceptions")
@pytest.mark.parametrize("victim", [1, None])
def test_an_error_that_is_not_ours_names_a_rank_that_has_died(victim):
    with start(body_fails_after_a_death, 2, victim) as ranks:
        ranks.wait_for("here")
        if victim is not None:
            ranks.kill(victim)
            ranks.processes[victim].join()
            time.sleep(0.5)  # rank 0 hears of it within milliseconds
        ranks.tell("go", ranks=[0])
        time.sleep(0.5)
        ranks.tell("go", ranks=[1])
        outcome = ranks.join()[0]
    assert outcome.error == "RuntimeError" and ("rank 1 of this rank's group has died" in outcome.traceback) == (
        victim == 1
    )


@pytest.mark.parametrize("phase", ["before load", "before commit", "after commit", "in use"])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_by_all_others_in_every_phase(phase, victim):
    with start(body_dies_in, 3, phase, victim) as ranks:
        ranks.wait_for("here", [victim])
        time.sleep(0.3)
        ranks.kill(victim)
        killed = time.monotonic()
        outcomes = ranks.join()
    for outcome in outcomes:
        if outcome.rank == victim:
            assert outcome.exitcode == -signal.SIGKILL
            continue
        assert outcome.value is not None, outcome
        rank, message, seen, closing = outcome.value
        assert rank == victim and f"rank {victim}" in message
        assert seen - killed < SEEN_WITHIN_S and closing < SEEN_WITHIN_S
        assert outcome.exitcode == 0


def body_killed_while_fetching(ctx):
    with WeightPool([SPEC] * LAYERS, config=PoolConfig(timeout_s=30, mode="was", slots=1)) as pool:
        load_all(pool)
        pool.commit()
        ctx.say("fetching")
        try:
            for use in range(1_000_000):
                pool.acquire(use % LAYERS)
                pool.release(use % LAYERS)
        except PeerError as error:
            return error.rank


def test_a_death_in_the_middle_of_a_fetch_ends_the_wait_for_it(monkeypatch):
    monkeypatch.setenv("SIDP_CPU_LINK_GBPS", "0.00001")  # 36 kB take 3.6 s: the readers wait
    with start(body_killed_while_fetching, 2) as ranks:
        ranks.wait_for("fetching")
        time.sleep(0.5)
        ranks.kill(1)
        killed = time.monotonic()
        outcomes = ranks.join()
        assert time.monotonic() - killed < SEEN_WITHIN_S
    assert outcomes[0].value == 1


def body_error_on_the_way(ctx):
    pool = WeightPool([SPEC] * LAYERS, config=PoolConfig(timeout_s=30))
    try:
        with pool:
            load_all(pool)
            if ctx.rank == 1:
                raise RuntimeError("no more disk")
            pool.commit()
    except Exception as error:
        return type(error).__name__, str(error)


def test_an_exception_on_one_rank_reaches_the_others_where_they_wait():
    own = parallel_launch(body_error_on_the_way, 3)
    assert own[1] == ("RuntimeError", "no more disk")
    for rank in (0, 2):
        kind, message = own[rank]
        assert kind in ("SidpError", "PeerError") and "rank 1" in message


def body_never_comes(ctx):
    started = time.monotonic()
    if ctx.rank == 1:
        ctx.hear("end")
        return None
    try:
        WeightPool([SPEC] * LAYERS, config=PoolConfig(timeout_s=1.0))
    except PeerError as error:
        ctx.say("raised")
        return error.rank, str(error), time.monotonic() - started


def test_a_rank_that_never_comes_is_named_after_the_timeout():
    with start(body_never_comes, 2) as ranks:
        ranks.wait_for("raised", [0])
        ranks.tell("end")
        outcome = ranks.join()[0]
    rank, message, took = outcome.value
    assert rank == 1 and "within 1 s" in message and took < SEEN_WITHIN_S


def body_finishes_early(ctx):
    with WeightPool([SPEC] * LAYERS, config=PoolConfig(timeout_s=20)) as pool:
        load_all(pool)
        pool.commit()
        if ctx.rank == 0:
            return "done"
        time.sleep(0.5)  # rank 0 is closing by now
        reference = None
        for _ in range(20):
            outputs = [ffn_forward(torch.ones(1, 32), pool, layer) for layer in range(LAYERS)]
            assert reference is None or all(map(torch.equal, outputs, reference))
            reference = outputs
    return "done"


def test_a_rank_that_has_finished_serves_the_others_until_they_close():
    assert parallel_launch(body_finishes_early, 3) == ["done"] * 3


def body_never_closes(ctx):
    pool = WeightPool([SPEC] * LAYERS, config=PoolConfig(timeout_s=1.0))
    load_all(pool)
    pool.commit()
    if ctx.rank == 1:
        ctx.hear("end")
        pool.close()
        return None
    started = time.monotonic()
    pool.close()
    ctx.say("closed")
    return time.monotonic() - started


def test_close_does_not_wait_for_ever_for_a_rank_that_never_closes():
    with start(body_never_closes, 2) as ranks:
        ranks.wait_for("closed", [0])
        ranks.tell("end")
        assert ranks.join()[0].value < SEEN_WITHIN_S


def body_pools_in_sequence(ctx):
    sizes = []
    for _ in range(6):
        with WeightPool([SPEC] * LAYERS, config=PoolConfig(timeout_s=20)) as pool:
            load_all(pool)
            pool.commit()
            ffn_forward(torch.ones(1, 32), pool, 1)
        time.sleep(0.1)  # the store's thread ends by itself
        sizes.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    return sizes


def test_pools_one_after_another_leave_no_descriptor_and_no_thread_behind():
    for sizes in parallel_launch(body_pools_in_sequence, 2):
        assert sizes[-1] <= sizes[0], sizes


def body_forks(ctx):
    with WeightPool([SPEC] * LAYERS, config=PoolConfig(timeout_s=20)) as pool:
        load_all(pool)
        pool.commit()
        pid = os.fork()
        if pid == 0:
            try:
                with pytest.raises(PoolClosedError, match="fork"):
                    ffn_forward(torch.ones(1, 32), pool, 1 - ctx.rank)
            except BaseException:
                os._exit(1)
            os._exit(0)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            time.sleep(0.01)
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "the child hung"
        ffn_forward(torch.ones(1, 32), pool, 1 - ctx.rank)
        return os.waitstatus_to_exitcode(status)


def test_a_forked_child_gets_a_clear_error_and_harms_nobody():
    assert parallel_launch(body_forks, 2) == [0, 0]

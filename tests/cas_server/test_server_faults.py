"""Deaths, stops and timeouts: whoever needs the lost rank learns of it, the others go on, nothing hangs."""

from __future__ import annotations

import contextlib
import signal
import time

import pytest
import torch
from groups import error, exact, open_pool, rows_of

import sidp
from launch import start

SPEC = sidp.FFNSpec(48, 96, dtype=torch.float32)
SPECS = [SPEC] * 8


def _ask_for_ever(ctx, placement: str, timeout_s: float):
    """Rank 0 asks until it fails; the others serve until they are told to close, or killed."""
    pool = open_pool(SPECS, mode="cas", placement=placement, timeout_s=timeout_s)
    if ctx.rank > 0:
        ctx.say("serving")
        ctx.hear("close", 60)
        pool.close()
        return "closed"
    done = 0
    with pool:
        while True:
            for layer in range(len(SPECS)):
                x = rows_of(SPEC, 3, seed=layer)
                y = sidp.ffn_forward(x, pool, layer)
                if error(y, exact(x, SPEC, layer)) > 5e-6:
                    return f"torn result at layer {layer}"
            done += 1
            if done == 3:
                ctx.say("asking")


@pytest.mark.parametrize("placement", ["layer", "striped"])
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_owner_is_named(placement, sig):
    timeout_s = 20.0 if sig == signal.SIGKILL else 1.5
    with start(_ask_for_ever, 3, placement, timeout_s, timeout=60) as ranks:
        ranks.wait_for("asking", [0])
        ranks.wait_for("serving", [1, 2])
        ranks.kill(2, sig)
        while not ranks._outcomes[0].finished:
            assert ranks._pump(), "rank 0 hangs"
        lost = ranks._outcomes[0]
        if sig == signal.SIGSTOP:
            ranks.kill(2, signal.SIGKILL)
        ranks.tell("close", ranks=[1])
    assert lost.error == "PeerError", lost
    assert lost.attributes["rank"] == 2
    assert ("died" if sig == signal.SIGKILL else "did not answer within 1.5 s") in lost.message


def _in_the_middle(ctx, placement: str):
    """Rank 0 asks rank 1 while that is stopped, so that the request is under way for certain."""
    pool = open_pool(SPECS, mode="cas", placement=placement, slots=1, timeout_s=30.0)
    if ctx.rank == 1:
        ctx.say("serving")
        ctx.hear("close", 60)
        pool.close()
        return None
    ctx.hear("stopped")
    ctx.say("asking")
    begin = time.monotonic()
    with pool:
        x = rows_of(SPEC, 300)  # more than one piece
        y = sidp.ffn_forward(x, pool, 1)
    return time.monotonic() - begin, error(y, exact(x, SPEC, 1))


@contextlib.contextmanager
def _asking_a_stopped_owner(placement):
    """Ranks of which 0 waits for an answer of 1, which is stopped."""
    with start(_in_the_middle, 2, placement, timeout=60) as ranks:
        ranks.wait_for("serving", [1])
        ranks.kill(1, signal.SIGSTOP)
        ranks.tell("stopped", ranks=[0])
        ranks.wait_for("asking", [0])
        yield ranks


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_an_owner_killed_in_the_middle_of_a_request(placement):
    with _asking_a_stopped_owner(placement) as ranks:
        time.sleep(0.5)
        ranks.kill(1, signal.SIGKILL)
        killed = time.monotonic()
        lost = ranks.join()[0]
    assert lost.error == "PeerError" and lost.attributes["rank"] == 1 and "died" in lost.message, lost
    assert time.monotonic() - killed < 15  # the pool's own timeout is 30


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_an_owner_stopped_for_less_than_the_timeout_is_only_late(placement):
    with _asking_a_stopped_owner(placement) as ranks:
        time.sleep(1.0)
        ranks.kill(1, signal.SIGCONT)
        ranks.tell("close", ranks=[1])
        outcomes = ranks.join()
    assert [out.error for out in outcomes] == ["", ""], outcomes
    took, worst = outcomes[0].value
    assert took > 0.9 and worst < 5e-6


def _asks_and_is_stopped(ctx):
    pool = open_pool(SPECS, mode="cas", timeout_s=30.0)
    mine = [layer for layer in range(len(SPECS)) if pool.placement.owner(layer) in (0, 1)]
    worst, rounds, ended = 0.0, 0, False
    ctx.say("ready")
    if ctx.rank == 2:
        end = ctx.tmp / "end"
        while not ended:  # a round after the end as well, however early the stop came
            ended = end.exists()
            for layer in mine:
                x = rows_of(SPEC, 2 + rounds % 9, seed=rounds)
                worst = max(worst, error(sidp.ffn_forward(x, pool, layer), exact(x, SPEC, layer)))
            rounds += 1
        pool.close()
        return worst, rounds
    ctx.hear("stopped")
    for step in range(20):
        for layer in mine:
            x = rows_of(SPEC, 3, seed=step)
            worst = max(worst, error(sidp.ffn_forward(x, pool, layer), exact(x, SPEC, layer)))
    ctx.say("went on", pool.stats().requesters_retired)
    pool.close()
    return worst, 20


def test_a_stopped_requester_holds_nobody_up_and_goes_on_later():
    with start(_asks_and_is_stopped, 3, timeout=60) as ranks:
        ranks.wait_for("ready")
        ranks.kill(2, signal.SIGSTOP)
        ranks.tell("stopped", ranks=[0, 1])
        ranks.wait_for("went on", [0, 1])
        ranks.kill(2, signal.SIGCONT)
        (ranks._tmp / "end").touch()
        outcomes = ranks.join()
    assert [out.error for out in outcomes] == ["", "", ""], outcomes
    assert all(out.value[0] < 5e-6 and out.value[1] > 0 for out in outcomes)


def _others_go_on(ctx):
    pool = open_pool(SPECS, mode="cas")
    mine = [layer for layer in range(len(SPECS)) if pool.placement.owner(layer) in (0, 1)]
    ctx.say("ready")
    if ctx.rank == 2:
        while True:  # asks until it is killed
            for layer in mine:
                sidp.ffn_forward(rows_of(SPEC, 2, seed=layer), pool, layer)
    ctx.hear("killed")
    worst = 0.0
    for step in range(20):
        for layer in mine:
            x = rows_of(SPEC, 3, seed=step)
            worst = max(worst, error(sidp.ffn_forward(x, pool, layer), exact(x, SPEC, layer)))
    lost = ""
    try:
        for layer in range(len(SPECS)):
            sidp.ffn_forward(rows_of(SPEC, 3), pool, layer)
    except sidp.PeerError as failure:
        lost = f"rank {failure.rank}"
    retired = pool.stats().requesters_retired
    pool.close()
    return worst, retired, lost


def test_a_requester_that_dies_is_forgotten():
    with start(_others_go_on, 3, timeout=60) as ranks:
        ranks.wait_for("ready")
        ranks.kill(2)
        ranks.processes[2].join(10)
        ranks.tell("killed", ranks=[0, 1])
        outcomes = ranks.join()
    for out in outcomes[:2]:
        assert out.error == "", out
        worst, retired, lost = out.value
        assert worst < 5e-6
        assert retired == 1
        assert lost == "rank 2"


def _fails(ctx):
    pool = open_pool(SPECS, mode="cas", timeout_s=30)
    if ctx.rank == 1:
        with pool:
            raise RuntimeError("a mistake of the application")
    with pool:
        while True:
            for layer in range(len(SPECS)):
                sidp.ffn_forward(rows_of(SPEC, 1), pool, layer)


def test_an_owner_that_raised_is_named_at_once():
    with start(_fails, 2, timeout=25) as ranks:  # well under the pool's own timeout
        outcomes = ranks.join()
    assert outcomes[1].error == "RuntimeError"
    assert outcomes[0].error == "PeerError" and outcomes[0].attributes["rank"] == 1

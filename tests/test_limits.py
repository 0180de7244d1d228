"""What a machine or its user may do to a rank: few descriptors, signals in every phase. A reason, an exit code, nothing left."""

import os
import resource
import signal
import threading
import time

import pytest
import torch
from weights import load_all

from launch import start
from sidp import FFNSpec, PoolConfig, SidpError, WeightPool, ffn_forward

pytestmark = pytest.mark.usefixtures("nothing_left_in_shared_memory")

SPEC = FFNSpec(32, 96, dtype=torch.float32)
LAYERS = 6
# Well within the pools' own timeout. The contract says 5 s, and it takes milliseconds (docs/faults.md); but a machine that runs
# tests may stand still for longer than that.
SEEN_WITHIN_S = 20.0


def body_few_descriptors(ctx, free):
    ffn_forward_once(WeightPool([SPEC] * LAYERS))  # whatever a first pool imports and opens for good
    for thread in threading.enumerate():  # what the first pool still closes would be free for the second, or not
        if thread.name == "sidp-store":
            thread.join(10)
    if ctx.rank == 1:
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + free, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        ffn_forward_once(WeightPool([SPEC] * LAYERS, config=PoolConfig(timeout_s=10, slots=2)))
    except SidpError as error:
        return str(error)
    return "worked"


def ffn_forward_once(pool):
    with pool:
        load_all(pool)
        pool.commit()
        ffn_forward(torch.ones(1, 32), pool, 1)


@pytest.mark.parametrize("free", [1, 2, 3, 5, 40])
def test_few_descriptors_are_named_on_every_rank(free):
    with start(body_few_descriptors, 2, free) as ranks:
        outcomes = ranks.join()
    for outcome in outcomes:
        assert not outcome.error, outcome
        assert outcome.value == "worked" or "Too many open files" in outcome.value, outcome.value
    assert (outcomes[0].value == "worked") == (outcomes[1].value == "worked")
    assert outcomes[0].value == "worked" or free < 40


def body_is_signalled(ctx, phase, victim):
    mode = "cas" if phase == "amid CaS requests" else "was"

    def stay(at):
        if phase == at and ctx.rank == victim:
            ctx.say("here")
            time.sleep(60)

    try:
        with WeightPool([SPEC] * LAYERS, config=PoolConfig(timeout_s=30, slots=2, mode=mode)) as pool:
            stay("loading")
            load_all(pool)
            stay("before commit")
            if phase == "waiting in commit":
                if ctx.rank == 0:
                    ctx.hear("go on")
                ctx.say("here")
            pool.commit()
            for use in range(1_000_000):
                stay("in use")
                ffn_forward(torch.ones(1, 32), pool, use % LAYERS)
                if phase.endswith(("requests", "closing")) and use == 5 * LAYERS:
                    ctx.say("here")
                    if phase == "closing" and ctx.rank == victim:
                        break
    except SidpError as error:
        return str(error), time.monotonic()


@pytest.mark.parametrize(
    "phase", ["loading", "before commit", "waiting in commit", "in use", "amid CaS requests", "closing"]
)
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_one_rank_and_the_others_say_why(phase, sig):
    victim = 1
    with start(body_is_signalled, 3, phase, victim) as ranks:
        ranks.wait_for("here", [victim])
        time.sleep(0.2)
        ranks.kill(victim, sig)
        sent = time.monotonic()
        ranks.processes[victim].join(SEEN_WITHIN_S)
        ranks.tell("go on")
        outcomes = ranks.join()
    assert outcomes[victim].exitcode not in (0, None)
    for rank in (0, 2):
        message, seen = outcomes[rank].value
        assert f"rank {victim}" in message and seen - sent < SEEN_WITHIN_S, outcomes[rank]

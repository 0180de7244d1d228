"""The helper that every multi-process test stands on."""

from __future__ import annotations

import os
import signal
import time

import pytest

from launch import RankFailed, parallel_launch, start


def _sum_over_ranks(ctx, addend):
    import torch
    import torch.distributed as dist

    value = torch.tensor([ctx.rank + addend])
    dist.all_reduce(value)
    return int(value)


def _fail_on_one(ctx):
    if ctx.rank == 1:
        raise ValueError("bad luck")
    return os.environ.get("SIDP_TEST_WORD")


def _say_and_wait(ctx):
    ctx.say("ready", ctx.rank * 10)
    return ctx.hear("go")


def _hang(ctx):
    time.sleep(600)


@pytest.mark.parametrize("rendezvous", ["tcp", "file"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_values_come_back_by_rank(world_size, rendezvous):
    expected = sum(range(world_size)) + 5 * world_size
    assert parallel_launch(_sum_over_ranks, world_size, 5, rendezvous=rendezvous) == [expected] * world_size


def test_an_exception_carries_its_rank_and_traceback(monkeypatch):
    monkeypatch.setenv("SIDP_TEST_WORD", "seen")
    with pytest.raises(RankFailed, match="rank 1: ValueError bad luck") as caught:
        parallel_launch(_fail_on_one, 2, rendezvous="none")
    assert "_fail_on_one" in str(caught.value)
    assert caught.value.outcomes[0].value == "seen"


def test_a_rank_can_be_killed_in_the_middle():
    with start(_say_and_wait, 2, rendezvous="none") as ranks:
        assert ranks.wait_for("ready") == [0, 10]
        ranks.kill(1)
        ranks.tell("go", "went")
        outcomes = ranks.join()
    assert outcomes[0].value == "went" and outcomes[0].exitcode == 0
    assert not outcomes[1].finished and outcomes[1].exitcode == -signal.SIGKILL


def test_the_deadline_kills_and_says_where_ranks_were():
    with pytest.raises(RankFailed, match="out of time") as caught:
        parallel_launch(_hang, 2, rendezvous="none", timeout=3.0)
    assert "_hang" in str(caught.value)
    assert [out.exitcode for out in caught.value.outcomes] == [-signal.SIGKILL] * 2

"""sidp.launch: results by rank, and an end with the first cause when a rank fails."""

import os
import signal
import time

import pytest

from sidp.errors import ConfigError, PeerError
from sidp.launch import RankFailed, launch, threads_per_rank

pytestmark = pytest.mark.timeout(120)


def gather(context, word):
    import torch
    import torch.distributed as dist

    total = torch.tensor([context.rank])
    dist.all_reduce(total)
    context.send(f"{word} {context.rank}")
    return context.rank, context.world_size, int(total), torch.get_num_threads(), context.threads


def fail(context, victim, how):
    import torch.distributed as dist

    if context.rank == victim:
        if how == "raise":
            raise ValueError("the bytes are wrong")
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":  # the peers complain too, and sooner or later than the victim
        raise PeerError(f"rank {victim} is gone", victim)
    dist.barrier()


def sleep(context, seconds):
    time.sleep(seconds)


def test_results_come_by_rank_and_messages_from_all():
    heard = []
    results = launch(gather, 3, ("hello",), on_message=lambda rank, message: heard.append((rank, message)))
    threads = threads_per_rank(3)
    assert results == [(rank, 3, 3, threads, threads) for rank in range(3)]
    assert sorted(heard) == [(rank, f"hello {rank}") for rank in range(3)]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_raising_rank_is_named_before_its_peers_complaints(victim):
    with pytest.raises(RankFailed) as caught:
        launch(fail, 2, (victim, "raise"))
    assert caught.value.rank == victim
    assert "ValueError: the bytes are wrong" in str(caught.value)
    assert "Traceback" in caught.value.detail


def test_a_killed_rank_ends_the_others():
    start = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank \d failed") as caught:
        launch(fail, 2, (1, "kill"))
    assert caught.value.rank == 1
    assert "SIGKILL" in str(caught.value)
    assert time.monotonic() - start < 60  # not the barrier's own two minutes


def test_a_time_limit_names_the_ranks_at_work():
    with pytest.raises(RankFailed, match=r"ranks still at work: \[0, 1\]"):
        launch(sleep, 2, (600,), timeout_s=3)


def test_no_ranks_are_refused():
    with pytest.raises(ConfigError, match="world_size is 0"):
        launch(sleep, 0, (1,))

"""A group that outlives one loss: the survivors' results stay bit for bit, a second loss ends it, and nothing hangs."""

import signal
import time
from dataclasses import replace

import pytest
import torch

from launch import start
from sidp import ConfigError, FFNSpec, PeerError, PoolConfig, WeightPool, ffn_forward
from sidp.backups import BackupPlan
from sidp.ffn import apply_formula

SPEC = FFNSpec(32, 96, dtype=torch.float32)
LAYERS = 7


def weights(layer):
    generator = torch.Generator().manual_seed(layer)
    return {t.name: torch.randn(t.shape, generator=generator) for t in SPEC.unit().tensors}


def read_again(layer, name, index):
    return weights(layer)[name][index]


def make_pool(placement="layer", backup="peer", mode="was", timeout_s=20.0, reader=read_again, **fields):
    config = PoolConfig(
        mode=mode,
        placement=placement,
        slots=2,
        redundancy=1,
        backup=backup,
        timeout_s=timeout_s,
        device="cpu",
        **fields,
    )
    pool = WeightPool([SPEC] * LAYERS, config=config)
    for layer in range(LAYERS):
        pool.load(layer, weights(layer))
    if reader is not None:
        pool.backup_from(reader)
    pool.commit()
    return pool


def body_goes_on(ctx, victim, settings, exact):
    """Forwards until every survivor has done some after the loss; all of them checked."""
    reference = [weights(layer) for layer in range(LAYERS)]
    generator = torch.Generator().manual_seed(100 + ctx.rank)
    with make_pool(**settings) as pool:
        forwards = after = 0
        while after < 4:
            if forwards == 3:
                ctx.say("here")
            for layer in range(LAYERS):
                x = torch.randn(1 + forwards % 5, 32, generator=generator)
                y = ffn_forward(x, pool, layer)
                expected = apply_formula(x, reference[layer], SPEC)
                if exact:
                    assert torch.equal(y, expected), (layer, forwards)
                else:
                    wide = {name: tensor.double() for name, tensor in reference[layer].items()}
                    assert (y - apply_formula(x.double(), wide, SPEC)).abs().max() < 1e-4 * expected.abs().max()
            forwards += 1
            after += pool.stats().lost_rank == victim
            if after == 1:
                ctx.say("went on")
        stats = pool.stats()
        read_from = {owner for layer in range(LAYERS) for owner in pool._ring.owners(layer)}
    return stats.lost_rank, stats.recovery_seconds, stats.backup_bytes, read_from


@pytest.mark.parametrize("backup", ["peer", "host", "file"])
@pytest.mark.parametrize("placement", ["layer", "striped"])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_costs_no_bit(backup, placement, victim):
    settings = {"placement": placement, "backup": backup}
    with start(body_goes_on, 3, victim, settings, True) as ranks:
        ranks.wait_for("here")
        ranks.kill(victim)
        outcomes = ranks.join()
    for outcome in outcomes:
        if outcome.rank == victim:
            assert outcome.exitcode == -signal.SIGKILL
            continue
        assert not outcome.error, outcome
        lost, seconds, backup_bytes, read_from = outcome.value
        assert lost == victim and seconds > 0 and outcome.exitcode == 0
        assert (backup_bytes > 0) == (backup == "peer")
        assert (victim in read_from) == (backup == "host")


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_requests_to_a_killed_owner_are_made_good(placement):
    settings = {"placement": placement, "mode": "cas"}
    with start(body_goes_on, 3, 1, settings, False) as ranks:
        ranks.wait_for("here")
        ranks.kill(1)
        outcomes = ranks.join()
    assert [outcomes[rank].value[0] for rank in (0, 2)] == [1, 1], outcomes


def body_two_ranks(ctx):
    return body_goes_on(ctx, 0, {"backup": "peer"}, True)


def test_one_of_two_goes_on_alone():
    with start(body_two_ranks, 2) as ranks:
        ranks.wait_for("here")
        ranks.kill(0)
        outcome = ranks.join()[1]
    assert not outcome.error and outcome.value[0] == 0, outcome


def body_stopped(ctx, victim):
    try:
        return body_goes_on(ctx, victim, {"mode": "cas", "timeout_s": 2.0}, False)
    except PeerError as error:
        return error.rank, str(error)


def test_a_rank_that_hangs_is_given_up_and_told():
    victim = 1
    with start(body_stopped, 3, victim) as ranks:
        ranks.wait_for("here")
        ranks.kill(victim, signal.SIGSTOP)
        ranks.wait_for("went on", [0, 2])
        ranks.kill(victim, signal.SIGCONT)
        outcomes = ranks.join()
    for rank in (0, 2):
        assert outcomes[rank].value[0] == victim, outcomes
    rank, message = outcomes[victim].value
    assert rank == victim and "goes on without it" in message


def body_second_death(ctx, first, second):
    with make_pool() as pool:
        x = torch.ones(1, 32)
        try:
            for use in range(10_000_000):
                ffn_forward(x, pool, use % LAYERS)
                if use == 20:
                    ctx.say("here")
                if pool.stats().lost_rank == first:
                    ctx.say("went on")
        except PeerError as error:
            return error.rank, str(error), time.monotonic()


def test_a_second_death_is_named():
    with start(body_second_death, 3, 0, 2) as ranks:
        ranks.wait_for("here")
        ranks.kill(0)
        ranks.wait_for("went on", [1, 2])
        ranks.kill(2)
        killed = time.monotonic()
        outcome = ranks.join()[1]
    rank, message, seen = outcome.value
    assert rank == 2 and "after rank 0" in message and "redundancy=1" in message and seen - killed < 5


def body_slow_link(ctx):
    return body_goes_on(ctx, 1, {}, True)


def test_a_fetch_under_way_begins_anew_from_the_backup(monkeypatch):
    monkeypatch.setenv("SIDP_CPU_LINK_GBPS", "0.0005")  # 36 kB take 74 ms: most of the time a fetch is under way
    with start(body_slow_link, 3) as ranks:
        ranks.wait_for("here")
        ranks.kill(1)
        outcomes = ranks.join()
    assert [outcomes[rank].value[0] for rank in (0, 2)] == [1, 1], outcomes


def failing_reader(layer, name, index):
    raise OSError("the disk is gone")


def body_no_file(ctx):
    try:
        with make_pool(backup="file", reader=failing_reader) as pool:
            for use in range(10_000_000):
                ffn_forward(torch.ones(1, 32), pool, use % LAYERS)
                if use == 20:
                    ctx.say("here")
    except PeerError as error:
        return str(error)


def test_a_backup_that_cannot_be_read_ends_the_group_with_the_reason():
    with start(body_no_file, 3) as ranks:
        ranks.wait_for("here")
        ranks.kill(1)
        outcomes = ranks.join()
    messages = [outcomes[rank].value for rank in (0, 2)]
    assert any("the disk is gone" in message for message in messages), messages
    assert all("restore" in message for message in messages), messages


def body_without_reader(ctx):
    with pytest.raises(ConfigError, match="backup_from"):
        make_pool(backup="file", reader=None)


def test_files_have_to_be_known():
    with start(body_without_reader, 2) as ranks:
        assert [outcome.error for outcome in ranks.join()] == ["", ""]


def test_bad_fields_are_refused():
    with pytest.raises(ConfigError, match="redundancy"):
        PoolConfig(redundancy=2)
    with pytest.raises(ConfigError, match="backup"):
        PoolConfig(backup="tape")


@pytest.mark.parametrize("kind", ["layer", "striped"])
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_every_extent_has_one_copy_elsewhere_and_they_are_spread(kind, world):
    from sidp._native import C
    from sidp.shares import unit_layout

    layers = 2 * world * (world - 1)
    placement = C.Placement(kind, [unit_layout(SPEC.unit())] * layers, world, 0)
    plan = BackupPlan(placement, world, layers, "peer")
    held = {(place.layer, place.owner): place for place in plan.places}
    for layer in range(layers):
        for owner in range(world):
            nbytes = placement.share(layer, owner).bytes
            assert ((layer, owner) in held) == (nbytes > 0)
            if nbytes:
                assert held[layer, owner].holder != owner and held[layer, owner].nbytes == nbytes
    for rank in range(world):
        mine = sorted((place.offset, place.nbytes) for place in plan.places if place.holder == rank)
        end = placement.arena_bytes(rank)
        for offset, nbytes in mine:
            assert offset == end
            end += nbytes
        assert end == plan.extent_bytes()[rank]
        if kind == "layer":  # equal units: a rank keeps as much of others' as it owns
            assert plan.backup_bytes(rank) == placement.arena_bytes(rank)
        holders = [place.holder for place in plan.of(rank)]
        assert set(holders) == set(range(world)) - {rank}
        assert max(map(holders.count, holders)) - min(map(holders.count, holders)) <= 1
    assert not BackupPlan(placement, world, layers, "host").places
    # Where the arenas are device memory, the same copies lie in host memory of their own.
    beside = BackupPlan(placement, world, layers, "host", on_device=True)
    assert beside.extent_bytes() == [placement.arena_bytes(rank) for rank in range(world)]
    assert beside.host_bytes() == [plan.backup_bytes(rank) for rank in range(world)]
    assert [beside.kept_bytes(rank) for rank in range(world)] == [0] * world
    for here, there in zip(plan.places, beside.places, strict=True):
        assert here == replace(there, offset=there.offset + placement.arena_bytes(there.holder))

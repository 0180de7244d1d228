"""A group on GPUs that outlives one loss in WaS: the survivors' results stay bit for bit, eager and in graphs."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from chain import HIDDEN, INNER, capture, forward, inputs, pool_of, reference, weights_of
from launch import start
from sidp import ConfigError, FFNSpec, PoolConfig, WeightPool
from sidp._native import C

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif(not getattr(C, "with_cuda", False), reason="the extension was built without CUDA"),
]
alone = pytest.mark.skipif(
    "CUDA_MPS_PIPE_DIRECTORY" in os.environ, reason="MPS gives no promise to clients when one is killed"
)

LAYERS, WORLD = 9, 3


def goes_on_body(ctx, victim, settings):
    """Forwards, eager and by a graph in turns, until some have been done after the loss; all of them checked."""
    torch.cuda.set_device(ctx.rank % torch.cuda.device_count())
    spec = FFNSpec(HIDDEN, INNER)
    weights = weights_of(spec, layers=LAYERS)
    with pool_of(spec, weights, slots=2, redundancy=1, **settings) as pool:
        x = inputs(ctx.rank)
        graph, y = capture(pool, x)
        after, checked = 0, 0
        while after < 6 and checked < 20_000:
            x.copy_(inputs(1000 * ctx.rank + checked))
            if checked % 2:
                graph.replay()
            result = y if checked % 2 else forward(x, pool)
            assert torch.equal(result, reference(x, weights, spec)), (checked, pool.stats().lost_rank)
            checked += 1
            if checked == 8:
                ctx.say("here")
            after += pool.stats().lost_rank == victim
        again, y = capture(pool, x)
        again.replay()
        assert torch.equal(y, reference(x, weights, spec))
        stats = pool.stats()
        read_from = set() if pool._ring is None else {o for layer in range(LAYERS) for o in pool._ring.owners(layer)}
        del graph, again
    return stats.lost_rank, stats.recovery_seconds, stats.backup_bytes, read_from


# Settings, the lost rank, whether its memory is read on.
CASES = {
    "layer-peer": ({"placement": "layer", "backup": "peer", "force_fetch": True}, 0, False),
    "layer-host": ({"placement": "layer", "backup": "host", "force_fetch": True}, 2, False),
    "striped-peer": ({"placement": "striped", "backup": "peer"}, 2, False),
    "striped-host": ({"placement": "striped", "backup": "host"}, 0, False),
    "in-place": ({"placement": "layer", "backup": "peer"}, 1, False),
    "host-tier": ({"placement": "layer", "backup": "host", "host_tier": True}, 1, True),
    "host-tier-peer": ({"placement": "striped", "backup": "peer", "host_tier": True}, 1, False),
}


@alone
@pytest.mark.parametrize("case", CASES)
def test_a_killed_rank_costs_no_bit(case):
    settings, victim, read_on = CASES[case]
    if not settings.get("host_tier") and C.vmm_refusal(0):
        pytest.skip(f"VMM handles: {C.vmm_refusal(0)}")
    with start(goes_on_body, WORLD, victim, settings, timeout=90) as ranks:
        ranks.wait_for("here")
        ranks.kill(victim)
        outcomes = ranks.join()
    assert outcomes[victim].exitcode == -signal.SIGKILL
    for outcome in outcomes:
        if outcome.rank == victim:
            continue
        assert not outcome.error, outcome
        lost, seconds, backup_bytes, read_from = outcome.value
        assert lost == victim and seconds > 0
        assert (backup_bytes > 0) == (settings["backup"] == "peer")
        assert (victim in read_from) == read_on


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"mode": "cas"}, "mode='cas'"),
        ({"mode": "was", "backup": "file"}, "backup='file'"),
        ({"mode": "was", "host_tier": True, "device_bytes": 1 << 20}, "device_bytes"),
    ],
)
def test_what_does_not_go_with_redundancy_is_refused(settings, named):
    config = PoolConfig(redundancy=1, device="cuda", **settings)
    with pytest.raises(ConfigError, match=named):
        WeightPool([FFNSpec(HIDDEN, INNER)] * LAYERS, config=config)

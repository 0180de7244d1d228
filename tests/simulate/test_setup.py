"""Whole setups: what must hold for every placement, mode and seed."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from sidp._native import C
from sidp.errors import ConfigError
from sidp.planner.capacity import Deployment
from sidp.planner.gpus import MEASURED_RATES, load_gpu
from sidp.planner.models import load_model
from sidp.simulate import workload
from sidp.simulate.machine import Engine, Fabric
from sidp.simulate.setup import Setup, run


def setup_of(dp=4, **rest):
    return Setup(Deployment(load_model("Qwen3-32B"), load_gpu("h20-141"), dp), **rest)


def small_job(dp=4, seed=0):
    return workload.job(24, 64, 32, spread=0.5, seed=seed, ranks=dp)


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_every_fetch_brings_the_remote_bytes_of_its_placement(placement):
    """Forwards x remote bytes, and at most what a ring holds more, fetched ahead at the end."""
    setup = setup_of(mode="was", placement=placement)
    requests = workload.decoding(4, 8, 5, 256)
    outcome = run(setup, requests)
    plan = setup.memory()
    native = C.Placement(placement, setup.deployment.layouts, 4)
    ahead = plan.slots[0] * native.largest_unit_bytes
    for rank in range(4):
        read = sum(n for owner, n in enumerate(outcome.native.read[rank]) if owner != rank)
        assert 5 * plan.fetched_bytes[rank] <= read <= 5 * plan.fetched_bytes[rank] + ahead


@pytest.mark.parametrize("mode", ["local", "was", "cas", "auto", "gather"])
@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_every_token_is_answered_once(mode, placement):
    requests = small_job()
    outcome = run(setup_of(mode=mode, placement=placement), requests)
    assert outcome.tokens == sum(r.answer for r in requests)
    assert sum(r.requests for r in outcome.native.ranks) == len(requests)
    assert all(0 < t <= outcome.seconds for t in outcome.native.finished_s)


@pytest.mark.parametrize("placement", ["layer", "striped"])
@pytest.mark.parametrize("dp", [4, 8])
def test_ranks_in_step_find_every_owner_free(placement, dp):
    """The rule of the design: one owner, one reader, in steady state. Without jitter, and with fetches that bound the time."""
    setup = setup_of(dp, mode="was", placement=placement, engine=Engine(jitter=0))
    assert run(setup, workload.decoding(dp, 32, 8, 256)).crowded == pytest.approx(0, abs=0.01)
    if placement == "layer":
        assert run(replace(setup, peak_shifting=False), workload.decoding(dp, 32, 8, 256)).crowded > 0.2


def test_out_of_step_the_shifted_order_is_lost_unless_owners_take_turns():
    requests = workload.decoding(4, 32, 30, 256)
    in_step, out_of_step, in_turns = (
        run(setup_of(mode="was", engine=Engine(jitter=jitter), fabric=Fabric(turns=turns)), requests).iteration_s
        for jitter, turns in ((0, False), (0.02, False), (0.02, True))
    )
    assert out_of_step > 1.3 * in_step
    assert in_turns < 1.05 * in_step


def test_a_seed_repeats_a_run_and_another_does_not():
    first, again = (run(setup_of(mode="auto"), small_job()) for _ in range(2))
    assert first.native.finished_s == again.native.finished_s
    assert first.native.read == again.native.read
    other = run(setup_of(mode="auto", seed=1), small_job())
    assert other.native.finished_s != first.native.finished_s


@pytest.mark.parametrize("mode", ["was", "cas", "gather"])
@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_more_bandwidth_is_never_slower(mode, placement):
    times = [
        run(
            setup_of(mode=mode, placement=placement, engine=Engine(jitter=0), fabric=Fabric(gbps, gbps, turns=True)),
            workload.decoding(4, 32, 6, 256),
        ).seconds
        for gbps in (25, 50, 100, 200, 400)
    ]
    assert all(b <= a * 1.02 for a, b in pairwise(times)), times
    assert times[-1] < times[0]


def test_was_takes_the_longer_of_compute_and_fetch():
    deployment = setup_of().deployment
    for rows, bound in ((4, "fetch"), (512, "compute")):
        setup = setup_of(
            mode="was", placement="striped", engine=Engine(jitter=0), fabric=Fabric(copy_bytes=0), kv_tokens=10**7
        )
        requests = workload.decoding(4, rows, 8, 256)
        outcome = run(setup, requests)
        local = run(replace(setup, mode="local"), requests).iteration_s
        fetch = max(setup.memory().fetched_bytes) / deployment.gpu.link_bytes_per_s
        expected = {"fetch": fetch, "compute": local}[bound]
        assert outcome.iteration_s == pytest.approx(expected, rel=0.12), bound


def test_auto_takes_cas_for_few_rows_and_was_for_many():
    shares = []
    for rows in (2, 1000):
        outcome = run(setup_of(mode="auto", kv_tokens=10**7), workload.decoding(4, rows, 40, 256))
        ranks = outcome.native.ranks
        shares.append(sum(r.cas_iterations for r in ranks) / sum(r.iterations for r in ranks))
    assert shares[0] > 0.8
    assert shares[1] == 0


def test_measured_times_replace_the_rooflines(tmp_path):
    profile = tmp_path / "p.json"
    deployment = setup_of().deployment
    gpu = deployment.gpu
    times = {"hidden_size": 5120, "intermediate_size": 25600, "rows": [1], "seconds": [0.1]}
    rates = {name: getattr(gpu, name) for name in MEASURED_RATES}
    profile.write_text(json.dumps({"sidp_profile": 1, "name": "x", **rates, "ffn_times": [times]}))
    measured = replace(deployment, gpu=load_gpu("measured", str(profile)))
    outcome = run(Setup(measured, mode="local"), workload.decoding(4, 1, 2, 256))
    assert outcome.iteration_s > 64 * 0.1


def test_refusals():
    with pytest.raises(ConfigError, match="mode must be"):
        setup_of(mode="fast")
    with pytest.raises(ConfigError, match="stages"):
        setup_of(mode="was", stages=2)
    with pytest.raises(ConfigError, match="does not fit"):
        run(Setup(Deployment(load_model("Llama-3.1-70B"), load_gpu("h100"), 8), mode="local"), small_job(8))
    with pytest.raises(ConfigError, match="spread"):
        workload.job(1, 1, 1, spread=1.5)

"""Times against rooflines by hand and against what was measured; profiles, good and bad."""

import json

import pytest

from sidp.errors import ConfigError
from sidp.planner.advice import make_plan
from sidp.planner.capacity import Deployment, pooled
from sidp.planner.crossover import Clock
from sidp.planner.gpus import load_gpu
from sidp.planner.models import load_model

# One H100, an FFN of Qwen3-32B in bf16 through cuBLAS: rows and seconds.
MEASURED = {
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "rows": [1, 16, 64, 128, 256, 512, 1024, 2048],
    "seconds": [308e-6, 321e-6, 325e-6, 346e-6, 392e-6, 635e-6, 1257e-6, 2683e-6],
}
RATES = {
    "memory_bytes": 84_900_000_000,
    "hbm_bytes_per_s": 3.0e12,
    "flops_per_s": 600e12,
    "link_bytes_per_s": 375e9,
}


def clock(gpu, dp=8, **rest):
    d = Deployment(load_model("Qwen3-32B"), gpu, dp, **rest)
    return Clock(d, pooled(d, "layer"))


@pytest.fixture
def profile(tmp_path):
    def write(**changes):
        path = tmp_path / "profile.json"
        path.write_text(json.dumps({**RATES, "name": "lent H100", **changes}))
        return str(path)

    return write


def test_fetch_of_an_iteration_is_the_remote_bytes_over_the_link():
    layer = 3 * 5120 * 25600 * 2
    t = clock(load_gpu("h20"))
    assert t.at(1).fetch == pytest.approx(56 * layer / 375e9)
    assert t.fetch_of_a_layer() == pytest.approx(layer / 375e9)


def test_one_row_takes_one_pass_over_the_weights(profile):
    gpu = load_gpu("measured", profile())
    model = load_model("Qwen3-32B")
    kinds = model.by_kind()
    read = 2 * (kinds["attention"] + kinds["ffn"] + kinds["lm_head"])
    t = clock(gpu).at(1)
    assert t.compute == pytest.approx((read + 768 * model.kv_bytes_per_token()) / 3.0e12)
    assert t.mode == "cas"  # eight replicas' rows cost no more than one pass


def test_crossovers_are_the_first_rows_that_hold():
    t = clock(load_gpu("h20"))
    hidden, was = t.hidden_rows(), t.was_rows()
    assert t.at(hidden).hidden and not t.at(hidden - 1).hidden
    assert t.at(was).mode == "was" and t.at(was - 1).mode == "cas"
    assert was < hidden
    assert t.at(0, t.prefill_rows()).hidden and not t.at(0, t.prefill_rows() - 1).hidden


def test_a_link_that_is_too_slow_hides_nothing(profile):
    assert clock(load_gpu("measured", profile(link_bytes_per_s=1e3))).hidden_rows() is None


def test_measured_ffn_times_replace_the_roofline(profile):
    t = clock(load_gpu("measured", profile(ffn_times=[MEASURED])))
    assert t.uses_measured_ffn
    assert t.ffn(256) == pytest.approx(64 * 392e-6)
    assert t.ffn(384) == pytest.approx(64 * (392e-6 + 635e-6) / 2)
    assert t.ffn(4096) == pytest.approx(64 * 2 * 2683e-6)
    other_shape = Deployment(load_model("Qwen3-32B"), load_gpu("measured", profile(ffn_times=[MEASURED])), 4, 2)
    assert not Clock(other_shape, pooled(other_shape, "layer")).uses_measured_ffn


def test_the_attained_roofline_is_near_the_measured_ffn():
    t = clock(load_gpu("h100"))
    for rows, seconds in zip(MEASURED["rows"], MEASURED["seconds"], strict=True):
        assert 0.7 < t.ffn(rows) / 64 / seconds < 1.1, rows


def test_a_job_brings_prompts_in_as_answers_go_out():
    t = clock(load_gpu("h200"), seq=1024, prompt=768)
    assert t.job(10).compute == t.at(10, 30).compute


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"link_bytes_per_s": None}, "link_bytes_per_s must be a positive number"),
        ({"flops_per_s": "fast"}, "'fast'"),
        ({"memory_bytes": True}, "memory_bytes"),
        ({"ffn_times": {}}, "must be a list"),
        ({"ffn_times": [{"rows": [1]}]}, "needs hidden_size"),
        ({"ffn_times": [{**MEASURED, "rows": [2, 1]}]}, "must ascend"),
        ({"ffn_times": [{**MEASURED, "seconds": [0.0] * 8}]}, "must be positive"),
    ],
)
def test_a_bad_profile_is_named(profile, changes, words):
    with pytest.raises(ConfigError, match=words):
        load_gpu("measured", profile(**changes))


def test_measured_and_profile_go_together(profile, tmp_path):
    with pytest.raises(ConfigError, match="needs --profile"):
        load_gpu("measured")
    with pytest.raises(ConfigError, match="goes with --gpu measured"):
        load_gpu("h100", profile())
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        load_gpu("measured", str(tmp_path / "none.json"))


def test_fetches_that_are_not_hidden_are_said_to_cost():
    plan = make_plan(Deployment(load_model("Llama-3.1-70B"), load_gpu("h200"), 4, 2, seq=4096))
    assert plan.best is plan.replicated
    assert "costs speed" in plan.advice[0]
    assert any("outlast" in line for line in plan.advice)

"""The experiments beside the paper: what each cause must do, whatever the figures are."""

import pytest

from sidp.cli import main
from sidp.errors import ConfigError
from sidp.simulate import causes, paper, studies
from sidp.simulate.machine import MEASURED_GEMM, Engine, Fabric, Rates
from sidp.simulate.paper import Figure, node, requests_of
from sidp.simulate.setup import Setup


def test_a_figure_agrees_within_15_percent_of_a_range():
    assert [Figure("x", 1.3, 1.5, s).ratio for s in (1.4, 1.04, 3.0)] == pytest.approx([1, 0.8, 2])
    assert [Figure("x", 1.0, 1.0, s).agrees for s in (0.84, 0.86, 1.14, 1.16)] == [False, True, True, False]


def test_capacity_is_the_planners():
    figures = list(paper.capacity())
    assert [f.unit for f in figures] == ["x", "x", "M", "M"]
    assert figures[2].simulated == sum(Setup(node("Llama-3.1-70B", "h200", 8, 1)).kv_by_rank()) / 1e6


def test_shifting_gains_where_ranks_are_in_perfect_step_and_nothing_where_they_are_not():
    in_step, out_of_step = (paper.shifting(4, engine=Engine(jitter=jitter)) for jitter in (0, 0.02))
    assert in_step > 1.3 > 1.1 > out_of_step
    assert paper.shifting(2, engine=Engine(jitter=0)) == pytest.approx(1, abs=0.05)  # nobody to share an owner with


def test_the_ladder_goes_down_where_ranks_meet_at_every_layer():
    change = {"step": "layer", "engine": Engine(layer_s=200e-6)}
    (effect,) = causes.ladder({"meet": change})
    gather, v1, v2 = (f.simulated for f in effect.figures)
    assert gather > v1 > v2 > 1
    steps = paper.ladder(**change)
    batches = [sum(r.batches_served for r in steps[n].native.ranks) for n in ("v1", "v2")]
    assert batches[0] > 1.4 * batches[1]
    assert sum(r.idle_iterations for r in steps["v3"].native.ranks) == 0


def test_a_cause_changes_the_pool_and_is_laid_beside_the_same_replicas():
    job = causes.JOBS[0]
    (plain,) = causes.throughput((job,), {"as assumed": {"tokens": 100_000}})
    (slow,) = causes.throughput((job,), {"slow": {"tokens": 100_000, "fabric": Fabric(5, 5)}})
    assert slow.figures[0].simulated < plain.figures[0].simulated


def test_measured_gemms_cost_more_near_the_ridge_and_nothing_far_beyond():
    d = node("Qwen3-32B", "h100", 8, 1)
    plan = Setup(d).memory()
    roofline, measured = (Rates(d, plan, Engine(gemm=gemm)) for gemm in ((), MEASURED_GEMM))
    assert measured.ffn(128) == pytest.approx(346e-6, rel=0.03)  # what the H100 took
    assert measured.ffn(1024) == pytest.approx(1257e-6, rel=0.03)
    assert measured.ffn(4096) == pytest.approx(roofline.ffn(4096))


def test_throughput_lays_pools_beside_every_way_that_fits():
    (made,) = paper.throughput(("Llama-3.1-70B",), ("h200",), (1024,), tokens=60_000)
    ways = {"TP8", "TP4 PP2", "TP2 PP4", "TP4 DP2 replicas", "TP2 DP4 replicas"}
    assert set(made.replicas) == ways  # at TP1 none fits
    assert set(made.pools) == set(made.turns) == {"TP2 DP4 layer", "TP1 DP8 layer"}
    assert made.gain() == made.best("pools")[1].tokens_per_s / made.best("replicas")[1].tokens_per_s
    assert made.gain("turns", "TP8") == made.best("turns")[1].tokens_per_s / made.replicas["TP8"].tokens_per_s
    assert made.gain("turns", "TP1 DP8 replicas") is None


def test_requests_have_the_tokens_asked_for():
    made = requests_of(1000, 4, tokens=400_000, prompt=0.25)
    assert len(made) == 400
    assert sum(r.prompt for r in made) == pytest.approx(100_000, rel=0.05)


def test_slower_links_are_crossed_later():
    made = {(c.link, c.turns): c for c in studies.crossings(gpus=("h20-141",), tried=(1, 64, 256, 512, 2048))}
    assert len(made) == 6
    for turns in (False, True):
        fast, slow = made["NVLink", turns], made["400G", turns]
        assert slow.fetch_s > fast.fetch_s
        assert slow.was_rows > fast.was_rows
        assert slow.hidden_rows is None or slow.hidden_rows > fast.hidden_rows
    assert made["NVLink", True].hidden_rows == 256  # compute 200 ms, fetch 117


def test_a_choice_names_what_fits():
    hosts = {"one-GPU hosts": ("h200", studies.LINKS["400G"], 1)}
    (choice,) = studies.choices(("Llama-3.1-70B",), (1024,), hosts, tokens=60_000)
    assert choice.replicas is None  # 141 GB do not hold it
    assert choice.pool[0] == choice.turns[0] == "TP1 DP8 layer"


def test_parts_of_the_report(capsys):
    assert main(["simulate", "--paper", "capacity", "fetch"]) == 0
    out = capsys.readouterr().out
    assert out.count("###") == 2
    assert "| KV tokens, Llama-3.1-70B, TP=1, DP=8 | 1M |" in out
    assert main(["simulate", "--paper", "weather"]) == 2
    assert "expected one of capacity" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_refused_before_anything_is_simulated(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["simulate", "--paper", "causes", "--out", str(tmp_path / "none")]) == 2
    told = capsys.readouterr()
    assert "create it first" in told.err and "###" not in told.out


def test_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    from sidp.simulate.figures import draw

    figures = list(paper.capacity())
    draw(str(tmp_path), "capacity.png", "capacity", figures)
    assert (tmp_path / "capacity.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match="cannot write"):
        draw(str(tmp_path / "absent"), "x.png", "capacity", figures)

"""`sidp plan` in this process: tables, JSON, plots and one-line errors."""

import json

import pytest

from sidp.cli import main

WORDS = ["plan", "--model", "Llama-3.1-70B", "--gpu", "h200", "--dp", "4", "--tp", "2"]


def test_json_holds_the_plan(capsys):
    assert main([*WORDS, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [option["kind"] for option in plan["options"]] == ["replicated", "layer", "striped"]
    assert plan["model"]["parameters"] == 70_553_706_496
    for option in plan["options"]:
        parts = ("other_bytes", "ffn_bytes", "ring_bytes", "activation_bytes", "reserve_bytes", "kv_bytes")
        assert sum(option[part] for part in parts) == option["usable_bytes"]
    assert plan["gpu"]["source"].startswith("datasheet")


def test_tables_and_plot(capsys, tmp_path):
    picture = tmp_path / "plan.png"
    assert main([*WORDS, "--placement", "striped", "--slots", "3", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "striped, 3 slots" in out and "KV tokens on the node" in out and "datasheet" in out
    assert "layer, " not in out.split("one GPU, GB")[1].split("iteration of")[0]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_plan_without_a_pool_is_drawn_too(tmp_path, capsys):
    picture = tmp_path / "plan.png"
    assert main(["plan", "--model", "Llama-3.1-8B", "--gpu", "h200", "--dp", "1", "--plot", str(picture)]) == 0
    assert "one rank" in capsys.readouterr().out
    assert picture.stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--model", "gpt-9"], "gpt-9"),
        (["--gpu", "a100"], "a100"),
        (["--tp", "3"], "tp=3"),
        (["--dp", "81", "--placement", "layer"], "dp=81"),
        (["--slots", "99"], "slots=99"),
        (["--plot", "x.txt"], ".png"),
        (["--utilization", "2"], "utilization"),
        (["--utilization", "nan"], "utilization"),
        (["--reserve-gib", "-1"], "reserve"),
    ],
)
def test_bad_usage_is_one_line(capsys, words, part):
    assert main([*WORDS, *words]) == 2
    err = capsys.readouterr().err.strip()
    assert part in err and "\n" not in err

"""`sidp plan --crossover`: where two measured curves meet, and both modes really run."""

import json

import pytest

from sidp.cli import main
from sidp.errors import ConfigError
from sidp.planner.measured import Point, crossing, measure


def points(*triples):
    return [Point(rows, was, cas, 0.0, 0.0) for rows, was, cas in triples]


def test_the_crossing_lies_between_the_points_where_the_order_changes():
    assert crossing(points((1, 10, 1), (10, 10, 6), (30, 12, 20))) == pytest.approx(10 + 20 * 4 / 12)
    assert crossing(points((1, 10, 1), (10, 10, 6))) is None  # CaS is faster everywhere
    assert crossing(points((4, 1, 2), (8, 1, 3))) == 4  # WaS is
    assert crossing(points((1, 5, 1), (2, 1, 2), (4, 5, 3), (8, 5, 7))) == pytest.approx(1 + 4 / 5)  # ties later on


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_both_modes_really_run(capsys, placement):
    words = [
        "--dp",
        "2",
        "--hidden",
        "64",
        "--inner",
        "512",
        "--layers",
        "6",
        "--link-gbps",
        "0.05",
        "--rows",
        "1",
        "512",
    ]
    assert main(["plan", "--crossover", *words, "--placement", placement, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "cpu" and [point["rows"] for point in found["points"]] == [1, 512]
    few, _ = found["points"]
    # 3 of 6 layers (in striped: half of each of them all) of 393 kB at 50 MB/s are 23.6 ms.
    assert few["was_expected"] > 0.0235
    assert min(few["was"], few["cas"], few["cas_expected"]) > 0


def test_the_table_says_both_crossings(capsys):
    words = ["--dp", "2", "--hidden", "32", "--inner", "64", "--layers", "8", "--link-gbps", "0.05", "--rows", "1", "8"]
    assert main(["plan", "--crossover", *words]) == 0
    out = capsys.readouterr().out
    assert "2 ranks, layer placement" in out and "(predicted)" in out and "(measured)" in out


def test_a_group_of_one_has_nothing_to_choose(capsys):
    assert main(["plan", "--crossover", "--dp", "1", "--rows", "1"]) == 2
    assert "2 ranks or more" in capsys.readouterr().err


def test_bad_rows_and_caps_are_named(capsys):
    with pytest.raises(ConfigError, match="ascending"):
        measure(None, 8, 2, rows=(4, 2))
    assert main(["plan", "--crossover", "--dp", "2", "--link-gbps", "-1"]) == 2
    assert "--link-gbps" in capsys.readouterr().err
    assert main(["plan", "--dp", "2"]) == 2
    assert "--model" in capsys.readouterr().err

"""`sidp simulate`: a job's table and JSON, and what it refuses."""

import json

from sidp.cli import main

JOB = [
    "simulate",
    "--model",
    "Qwen3-32B",
    "--gpu",
    "h200",
    "--dp",
    "4",
    "--requests",
    "16",
    "--prompt",
    "32",
    "--answer",
    "16",
]


def test_replicas_and_both_placements(capsys):
    assert main([*JOB, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["mode"], row["placement"]) for row in rows] == [("local", "-"), ("auto", "layer"), ("auto", "striped")]
    assert all(row["tokens/s"] > 0 for row in rows)
    assert rows[0]["fetched_GB"] == 0 < rows[1]["kv_tokens"] - rows[0]["kv_tokens"]


def test_a_table(capsys):
    assert main([*JOB, "--mode", "was", "--placement", "layer", "--link-gbps", "50"]) == 0
    head, row = capsys.readouterr().out.strip().splitlines()
    assert len(head.split()) == len(row.split())


def test_usage_errors(capsys):
    assert main(["simulate"]) == 2
    assert "--model" in capsys.readouterr().err
    assert main([*JOB, "--link-gbps", "0"]) == 2
    assert "--link-gbps" in capsys.readouterr().err

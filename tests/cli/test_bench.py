"""`sidp bench`: figures with verified bytes, waivers with a reason, a profile that both readers take."""

from __future__ import annotations

import json

import pytest
import torch
from test_command import assert_one_line_error, run

from sidp import FFNSpec, SidpError
from sidp.cli import bench, bench_copies
from sidp.planner.gpus import load_gpu
from sidp.policy import Profile


def test_the_cpu_backend_is_measured_and_the_rest_waived(tmp_path):
    figures, profile = tmp_path / "bench.json", tmp_path / "profile.json"
    ran = run("bench", "--cpu", "--hidden", "32", "--inner", "96", "--mb", "1", "--rounds", "1",
              "--json", str(figures), "--profile", str(profile), timeout=280)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    results = {result["what"]: result for result in json.loads(figures.read_text())["results"]}
    assert results["host memory to host memory"]["gb_s"] > 0
    assert "takes two" in results["copies between GPUs"]["waived"]
    pool = results["fetches of a pool"]
    assert pool["verified"] and pool["ratio"] > 0 and pool["pooled_ms"] > 0 and pool["open_ms"] > 0
    assert "fetches of a pool" in ran.stdout and "GB/s" in ran.stdout
    read = Profile.load(profile, [FFNSpec(32, 96, dtype=torch.float32).unit()])
    assert read.link_gbps == pytest.approx(pool["gb_s"]) and len(read.compute) == 4
    with pytest.raises(SidpError, match="planning needs memory_bytes"):
        load_gpu("measured", str(profile))


def test_bytes_that_do_not_arrive_are_an_error(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source, **_: self)
    with pytest.raises(SidpError, match="not those that were sent"):
        bench_copies.copies(torch.device("cpu"), 1 << 12, 1)


def test_a_line_says_figures_with_units():
    result = {"what": "a copy", "gb_s": 12.345678, "open_ms": 3.0, "ratio": 1.0, "verified": True}
    assert bench._line(result).split(None, 2)[2] == "12.35 GB/s, open 3 ms, ratio 1, bytes verified"
    assert bench._line(bench_copies.waived("x", "why")).endswith("waived: why")


def test_a_folder_that_is_not_there_is_named():
    assert_one_line_error(run("bench", "--json", "/nowhere/x.json"), "/nowhere")

"""`sidp run-batch` end to end over real processes: pooled against replicated, deaths, resume, torchrun."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from launch import ranks_of

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.17")

DEADLINE_S = 200


def command(*words, torchrun=0):
    start = [sys.executable, "-m", "sidp.cli"]
    if torchrun:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"]
        start += ["--no-python", sys.executable, "-m", "sidp.cli"]
    return [*start, "run-batch", "--model", "random", *map(str, words)]


def run(*words, torchrun=0):
    return subprocess.run(command(*words, torchrun=torchrun), capture_output=True, text=True, timeout=DEADLINE_S)


def write_input(folder, count=10, **fields):
    path = folder / "in.jsonl"
    prompts = ["def f(x):", "a", "the quick brown fox jumps over", "12 34 56", "Q: why?\nA:"]
    rows = [{"prompt": prompts[i % 5] * (1 + i // 5), "max_tokens": 6 + i % 7, **fields} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(path):
    """{custom_id: (status, text or error code)}; every line whole, no row twice."""
    text = Path(path).read_bytes()
    assert text.endswith(b"\n")
    lines = [json.loads(line) for line in text.splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {
        line["custom_id"]: (
            line["response"]["status_code"],
            line["response"]["body"]["choices"][0]["text"]
            if line["error"] is None
            else line["response"]["body"]["error"]["code"],
        )
        for line in lines
    }


def test_pooled_replicated_and_torchrun_give_the_same_tokens(tmp_path):
    source = write_input(tmp_path)
    with open(source, "a") as file:
        file.write('{"prompt": 3}\n')
    summaries = {}
    for name, words, torchrun in (
        ("pooled", ["--mode", "was"], 0),
        ("replicated", ["--no-pool"], 0),
        ("torchrun", ["--mode", "was", "--placement", "striped"], 2),
    ):
        told = tmp_path / f"{name}.json"
        ran = run("-i", source, "-o", tmp_path / name, "--group-size", 3, "--summary", told, *words, torchrun=torchrun)
        assert ran.returncode == 0, ran.stderr
        summaries[name] = json.loads(told.read_text())
        assert "11 of 11" in ran.stderr or "10 of 10" in ran.stderr
    pooled = answers(tmp_path / "pooled")
    assert len(pooled) == 11 and pooled["row-11"] == (400, "invalid_type")
    assert pooled == answers(tmp_path / "replicated") == answers(tmp_path / "torchrun")
    for name, summary in summaries.items():
        assert summary["requests"] == {"input": 11, "done_before": 0, "succeeded": 10, "failed": 1, "unanswered": 0}
        assert summary["output_tokens"] == sum(6 + i % 7 for i in range(10))
        assert summary["failed_ranks"] == {} and summary["pool_active"] == (name != "replicated")
        timeline = summary["timeline"]
        samples = [dict(zip(timeline["columns"], row, strict=True)) for row in timeline["rows"]]
        assert samples and samples[-1]["seconds"] <= summary["seconds"] + 1
        assert all(a["output_tokens"] <= b["output_tokens"] for a, b in itertools.pairwise(samples))
        assert sum(rank["succeeded"] for rank in summary["per_rank"]) == 10  # which rank did which is up to timing
        if name != "replicated":
            assert summary["mode_shares"]["was"] > 0 and all(r["freed_bytes"] > 0 for r in summary["per_rank"])
    # All is done: a resume has nothing to do and changes nothing.
    before = (tmp_path / "pooled").read_bytes()
    ran = run("-i", source, "-o", tmp_path / "pooled", "--resume")
    assert ran.returncode == 0 and (tmp_path / "pooled").read_bytes() == before
    printed = json.loads(ran.stdout)
    assert printed["requests"]["done_before"] == 11 and "timeline" not in printed


@contextlib.contextmanager
def started(*words):
    process = subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_lines(path, count, process):
    end = time.monotonic() + DEADLINE_S
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("words", [["--mode", "was"], ["--no-pool"]], ids=["pooled", "replicated"])
def test_a_rank_killed_in_the_middle(tmp_path, words):
    source, output = write_input(tmp_path, 24, ignore_eos=True), tmp_path / "out"
    # Many small groups, so that the kill falls between two.
    with started("-i", source, "-o", output, "--group-size", 1, *words) as process:
        wait_for_lines(output, 4, process)
        victim = ranks_of(process)[1]
        os.kill(victim, signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1, stderr
    summary = json.loads(stdout)
    assert list(summary["failed_ranks"]) == ["1"] and "SIGKILL" in summary["failed_ranks"]["1"]
    assert "rank 1 failed: killed by SIGKILL" in stderr
    there = answers(output)
    assert all(status == 200 for status, _ in there.values())
    assert summary["requests"]["unanswered"] == 24 - len(there)
    if "--no-pool" in words:  # the survivor took over
        assert len(there) == 24
    else:
        assert 4 <= len(there) < 24 and "--resume" in stderr
    # Tear the last line as well; a resume makes it whole.
    output.write_bytes(output.read_bytes()[:-7])
    ran = run("-i", source, "-o", output, "--group-size", 1, "--resume", *words)
    assert ran.returncode == 0, ran.stderr
    assert len(answers(output)) == 24 and json.loads(ran.stdout)["requests"]["done_before"] == len(there) - 1


def test_a_pool_with_backups_loses_no_request(tmp_path):
    victim = 0  # the first of the group, which an agreement through its store would need
    source, output = write_input(tmp_path, 24, ignore_eos=True), tmp_path / "out"
    # An explicit number of slots: two ranks with backups keep everything, and would not pool by themselves.
    words = ["--mode", "was", "--slots", "1", "--redundancy", "1", "--group-size", 1]
    with started("-i", source, "-o", output, *words) as process:
        wait_for_lines(output, 4, process)
        os.kill(ranks_of(process)[victim], signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=DEADLINE_S)
    summary = json.loads(stdout)
    assert list(summary["failed_ranks"]) == [str(victim)] and process.returncode == 1, stderr
    assert summary["pool_active"] and "goes on without it" in stderr
    assert summary["requests"]["unanswered"] == 0 and summary["requests"]["failed"] == 0
    ran = run("-i", source, "-o", tmp_path / "whole", "--no-pool", "--group-size", 1)
    assert ran.returncode == 0 and answers(output) == answers(tmp_path / "whole")


def test_an_interrupt_leaves_whole_lines_and_says_how_to_go_on(tmp_path):
    source, output = write_input(tmp_path, 24), tmp_path / "out"
    with started("-i", source, "-o", output, "--group-size", 1, "--metrics-port", 0) as process:
        port = int(next(line for line in process.stderr if "/metrics" in line).rsplit(":", 1)[1].split("/")[0])
        wait_for_lines(output, 2, process)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            series = response.read().decode()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130 and "--resume" in stderr
    assert 2 <= len(answers(output)) < 24
    for name in ("vllm:num_requests_running{", "vllm:generation_tokens_total{", "vllm:request_success_total{",
                 "vllm:kv_cache_usage_perc{", "sidp_ffn_calls_total{", "sidp_ring_stalls_total{"):  # fmt: skip
        assert name in series
    done = [line for line in series.splitlines() if line.startswith("vllm:request_success_total{")]
    assert sum(float(line.split()[-1]) for line in done) >= 2


def test_arguments_are_refused_before_anything_starts(tmp_path):
    source = write_input(tmp_path, 2)
    output = tmp_path / "out"
    output.write_text("something of the user's\n")
    for words, text in (
        (["-i", source, "-o", output], "--resume"),
        (["-i", source, "-o", output, "--resume"], "line 1 of"),
        (["-i", tmp_path / "none", "-o", tmp_path / "new"], "No such file"),
        (["-i", source, "-o", source], "another name"),
        (["-i", source, "-o", tmp_path / "new", "--temperature", "9"], "--temperature"),
    ):
        ran = run(*words)
        assert ran.returncode == 2 and text in ran.stderr and "Traceback" not in ran.stderr
    assert output.read_text() == "something of the user's\n"

"""`sidp run-batch` on one GPU: attention by torch's kernel, several ranks with even parts, pooled as replicated.

Needs a GPU and an extension built with CUDA; some five minutes. Ranks share the GPU: under MPS, or in turns, which takes longer.
A rank is killed only without MPS, which promises nothing to the others then.
"""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from launch import ranks_of  # noqa: E402
from sidp.batch import attention  # noqa: E402

DEADLINE_S = 150
SHAPE = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 2000, "hidden_size": 512,
    "intermediate_size": 6144, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "tie_word_embeddings": False, "max_position_embeddings": 4096, "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("window", [0, 24])
def test_the_kernel_against_float64(window):
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    query_lengths, past = [1, 1, 40, 7, 1], [0, 63, 0, 31, 200]
    key_lengths = [q + p for q, p in zip(query_lengths, past, strict=True)]
    query, key, value = (
        torch.randn((sum(lengths), heads, 128), generator=generator).cuda().bfloat16()
        for lengths, heads in ((query_lengths, 16), (key_lengths, 4), (key_lengths, 4))
    )
    ends = [torch.tensor([0, *lengths]).cumsum(0).int().cuda() for lengths in (query_lengths, key_lengths)]
    scale = 128**-0.5
    got = attention._flash(query, key, value, *ends, max(query_lengths), max(key_lengths), scale, window)
    q_at = k_at = 0
    for q_len, k_len in zip(query_lengths, key_lengths, strict=True):
        q = query[q_at : q_at + q_len].double()
        k, v = (t[k_at : k_at + k_len].double().repeat_interleave(4, 1) for t in (key, value))
        behind = (torch.arange(k_len) - (torch.arange(q_len) + k_len - q_len).unsqueeze(1)).cuda()
        hidden = (behind > 0) | (behind <= -window if window else behind > math.inf)
        scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(hidden, -math.inf)
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        assert (got[q_at : q_at + q_len].double() - expected).norm() <= 0.01 * expected.norm()
        q_at, k_at = q_at + q_len, k_at + k_len


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    rng = random.Random(8)
    with open(folder / "in.jsonl", "w") as file:
        for number in range(24):
            prompt = [rng.randrange(2000) for _ in range(20 + 13 * (number % 7))]
            row = {"id": f"r{number}", "prompt": prompt, "max_tokens": 8 + number % 5, "ignore_eos": True}
            file.write(json.dumps(row) + "\n")
    return folder


def run(work, *words, source="in.jsonl"):
    output, summary = work / "out.jsonl", work / "summary.json"
    command = [sys.executable, "-m", "sidp.cli", "run-batch", "-i", work / source, "-o", output, "--overwrite"]
    command += ["--model", work, "--load-format", "dummy", "--summary", summary, "--quiet", *words]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=DEADLINE_S)
    assert ran.returncode == 0, ran.stderr[-4000:]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 24 and all(line["error"] is None for line in lines)
    texts = {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in lines}
    return texts, json.loads(summary.read_text())


@pytest.mark.parametrize(
    "words", [[], ["--placement", "striped", "--slots", "2"], ["--host-tier"]], ids=["in place", "striped", "host"]
)
def test_pooled_gives_the_tokens_of_replicated(work, words):
    fixed = ["--dp", "2", "--batching", "grouped", "--group-size", "6", "--gpu-memory-utilization", "0.3"]
    expected, replicated = run(work, *fixed, "--no-pool")
    got, pooled = run(work, *fixed, "--mode", "was", *words)
    assert got == expected
    assert pooled["pool_active"] and all(rank["freed_bytes"] > 0 for rank in pooled["per_rank"])
    parts = [rank["kv_capacity"] for rank in replicated["per_rank"]]
    if torch.cuda.device_count() == 1:
        # With a GPU each it is what else runs there, this process too, that says how much is free.
        assert max(parts) <= 1.001 * min(parts)  # even, whoever came first
    if not words:
        assert pooled["kv_capacity_tokens"] > replicated["kv_capacity_tokens"]


@pytest.mark.parametrize("mode", ["was", "auto"])
def test_continuous_batching_answers_all(work, mode):
    texts, summary = run(
        work, "--dp", "2", "--mode", mode, "--gpu-memory-utilization", "0.3", "--max-batched-tokens", "256"
    )
    assert all(len(text.split()) == 8 + int(name[1:]) % 5 for name, text in texts.items())
    assert summary["output_tokens"] == sum(8 + n % 5 for n in range(24)) and summary["preemptions"] == 0


def test_auto_runs_both_modes_in_captured_steps_and_keeps_one(work, monkeypatch):
    """What is fetched within one GPU arrives sooner than a step ends, so that neither mode can be ruled out."""
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")
    rows = [{"id": f"t{n}", "prompt": [n + 1] * 9, "max_tokens": 120, "ignore_eos": True} for n in range(24)]
    (work / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--dp", "2", "--mode", "auto", "--placement", "striped", "--slots", "2", "--gpu-memory-utilization", "0.3"]
    texts, summary = run(work, *words, source="trials.jsonl")
    assert all(len(text.split()) == 120 for text in texts.values())
    ranks = [rank for rank in summary["per_rank"] if rank["replayed_steps"] > 60]
    assert ranks and all(rank["cas_up_to_rows"] or rank["was_from_rows"] for rank in ranks), summary["per_rank"]
    assert all(rank["calls_was"] and rank["calls_cas"] for rank in ranks)


@pytest.mark.skipif(
    "CUDA_MPS_PIPE_DIRECTORY" in os.environ, reason="MPS gives no promise to clients when one is killed"
)
@pytest.mark.parametrize("backup", ["peer", "host"])
def test_a_pool_with_backups_loses_no_request(work, backup):
    """A rank is killed in the middle; the other answers what it had, and every token is a replicated run's."""
    rows = [{"id": f"k{n}", "prompt": [n + 1] * 9, "max_tokens": 150, "ignore_eos": True} for n in range(24)]
    source, output, summary = work / "killed.jsonl", work / "killed.out", work / "killed.json"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output.unlink(missing_ok=True)
    words = [sys.executable, "-m", "sidp.cli", "run-batch", "-i", source, "--model", work, "--load-format", "dummy", "--dp", "2",
             "--batching", "grouped", "--group-size", "1", "--gpu-memory-utilization", "0.3", "--summary", summary]  # fmt: skip
    pooled = ["--mode", "was", "--slots", "1", "--redundancy", "1", "--backup", backup]
    process = subprocess.Popen([*map(str, words), "-o", str(output), *pooled], stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + DEADLINE_S
        while not output.exists() or output.read_bytes().count(b"\n") < 4:
            assert time.monotonic() < end and process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.kill(ranks_of(process)[0], signal.SIGKILL)
        _, stderr = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    told = json.loads(summary.read_text())
    assert list(told["failed_ranks"]) == ["0"] and "goes on without it" in stderr, stderr[-3000:]
    assert told["pool_active"] and told["requests"]["succeeded"] == len(rows), told["requests"]
    whole = work / "whole.out"
    ran = subprocess.run(
        [*map(str, words), "-o", str(whole), "--overwrite", "--no-pool"], capture_output=True, timeout=DEADLINE_S
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    texts = [
        {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in map(json.loads, path.open())}
        for path in (output, whole)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == len(rows)


def test_replayed_steps_give_the_tokens_of_steps_that_are_not_captured(work):
    """One engine, the same requests in the same groups: with graphs, and with every decode step run by the host."""
    from sidp.batch import decode
    from sidp.batch.engine import EngineOptions, PagedEngine, Ticket
    from sidp.batch.records import Defaults, parse_row
    from sidp.batch.text import Codec
    from sidp.hf.dummy import dummy_model

    model = dummy_model(str(work), torch.bfloat16, torch.device("cuda"))
    codec = Codec(None, set(), 4096, SHAPE["vocab_size"])
    rng = random.Random(5)
    rows = [{"prompt": [rng.randrange(2000) for _ in range(rng.choice((5, 127, 128, 300)))], "max_tokens": 140,
             "ignore_eos": True, "temperature": 0.7 * (n % 2), "seed": n} for n in range(11)]  # fmt: skip

    def answers(captures: bool):
        options = EngineOptions(
            grouped=True, max_batch=11, kv_bytes=2**28, samples=True, filters=False, mean_cost=300, batch_tokens=2048
        )
        engine = PagedEngine(model, codec, options)
        assert isinstance(engine._steps, decode.DecodeSteps)
        engine._steps.captures = captures
        requests = [parse_row(json.dumps(row).encode(), n, Defaults()).request for n, row in enumerate(rows)]
        engine.submit([Ticket(n, request, request.prompt, 140) for n, request in enumerate(requests)])
        tokens: dict[int, list[int]] = {}
        while len(tokens) < len(rows):
            for finished in engine.poll(60.0):
                assert finished.error is None
                tokens[finished.ticket.item] = finished.tokens
        graphs = len(engine._steps._graphs)
        engine.close()
        return tokens, graphs

    expected, none = answers(False)
    got, captured = answers(True)
    assert got == expected and none == 0 and captured >= 2

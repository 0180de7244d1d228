"""A real model over real prompts: a pooled run gives the tokens of --no-pool. The 200 of the long run, a few here."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("gguf", reason="the model is read from GGUF once: pip install 'sidp[demo]'")

from sidp.cli.models import resolve
from sidp.cli.prompts import load_prompts
from sidp.errors import ConfigError

DEADLINE_S = 250


@pytest.fixture(scope="module")
def model():
    try:
        return resolve("smollm2", print).path
    except ConfigError as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")


def answers(folder, model, *words):
    output, summary = folder / "out.jsonl", folder / "summary.json"
    command = [sys.executable, "-m", "sidp.cli", "run-batch", "-i", folder / "in.jsonl", "-o", output, "--overwrite"]
    command += ["--model", model, "--dp", 2, "--backend", "cpu", "--group-size", 3, "--max-tokens", 6, *words]
    command += ["--summary", summary]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=DEADLINE_S)
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(line["error"] is None for line in lines)
    texts = {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in lines}
    return texts, json.loads(summary.read_text())


@pytest.mark.timeout(2 * DEADLINE_S + 60)
def test_pooled_gives_the_tokens_of_replicated(tmp_path, model):
    prompts, _ = load_prompts(None, 6)
    rows = [{"id": prompt.name, "prompt": prompt.text} for prompt in prompts]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pooled, of_pooled = answers(tmp_path, model, "--mode", "was")
    replicated, of_replicated = answers(tmp_path, model, "--no-pool")
    assert len(pooled) == len(rows) and pooled == replicated
    assert any(text.strip() for text in pooled.values())
    assert of_pooled["pool_active"] and not of_replicated["pool_active"]
    assert all(rank["freed_bytes"] > 50e6 and rank["calls_was"] > 0 for rank in of_pooled["per_rank"])

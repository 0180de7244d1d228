"""`sidp demo` end to end with small models: every token checked, every figure consistent."""

import json

import pytest
from test_command import run

from sidp.cli.demo_rank import Answer, Run
from sidp.cli.demo_report import compare

pytest.importorskip("transformers")


def demo(*words):
    ran = run("demo", "--json", *words, timeout=280)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved Llama with a tokenizer of its own and an end token, as a user's folder has them."""
    tokenizers = pytest.importorskip("tokenizers")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=176, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=7, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    raw = tokenizers.Tokenizer(tokenizers.models.BPE({chr(33 + n): n for n in range(94)}, []))
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="!").save_pretrained(path)
    return path


def check(report, ranks, prompts, tokens):
    assert report["pooled"] and report["verified"] and report["all_equal"]
    assert report["tokens_equal"] == report["tokens_compared"] == tokens
    assert len(report["ranks"]) == ranks and len(report["answers"]) == prompts
    assert sum(len(answer["tokens"]) for answer in report["answers"]) == tokens
    owned = sum(rank["owned_bytes"] for rank in report["ranks"])
    assert owned >= report["ranks"][0]["replicated_bytes"]  # together they hold every byte
    for rank in report["ranks"]:
        assert rank["freed_bytes"] == rank["replicated_bytes"] - rank["owned_bytes"] - rank["ring_bytes"]
        assert rank["freed_kv_tokens"] == max(0, rank["freed_bytes"]) // rank["kv_bytes_per_token"]
        assert rank["fetches"] > 0 and rank["fetched_bytes"] > 0


@pytest.mark.parametrize("placement", ["layer", "striped"])
def test_the_random_model(placement):
    report = demo("--model", "random", "--max-prompts", "5", "--batch-size", "2", "--max-new-tokens", "6",
                  "--placement", placement)  # fmt: skip
    check(report, 2, 5, 30)
    # keys and values, 12 layers, 2 heads of 64, two bytes each
    assert report["ranks"][0]["kv_bytes_per_token"] == 2 * 12 * 2 * 64 * 2


def test_more_ranks_than_prompts():
    report = demo("--model", "random", "--dp", "3", "--max-prompts", "2", "--max-new-tokens", "4", "--slots", "2")
    assert [rank["tokens"] for rank in report["ranks"]] == [4, 4, 0]
    assert report["all_equal"] and report["tokens_compared"] == 8


def test_a_folder_a_prompt_file_and_a_picture(folder, tmp_path):
    (tmp_path / "ask.txt").write_text("hello\nwhat is\nlong prompt of many letters\n")
    picture = tmp_path / "timeline.png"
    report = demo("--model", folder, "--prompts", tmp_path / "ask.txt", "--max-new-tokens", "5", "--plot", picture,
                  "--slots", "1")  # fmt: skip
    assert report["all_equal"] and len(report["answers"]) == 3
    assert picture.stat().st_size > 10_000


def test_tables_for_people():
    pytest.importorskip("rich")
    ran = run("demo", "--model", "random", "--max-prompts", "2", "--max-new-tokens", "3", timeout=280)
    assert ran.returncode == 0, ran.stderr
    assert "tokens equal to the unpooled model: yes, 6/6" in ran.stdout
    for word in ("memory freed", "as KV cache", "stall time", "rank 1"):
        assert word in ran.stdout


def test_a_pool_error_is_one_line():
    ran = run("demo", "--model", "random", "--slots", "99")
    assert ran.returncode == 1
    assert "slots=99 is out of range" in ran.stderr.strip().splitlines()[-1]


def test_unequal_and_missing_tokens_are_counted():
    def a_run(*rows):
        return Run(tuple(Answer(prompt, tuple(row), "") for prompt, row in enumerate(rows)), 1.0)

    same = compare(a_run([1, 2], [3]), a_run([1, 2], [3]))
    assert same.all_equal and (same.equal, same.total) == (3, 3)
    changed = compare(a_run([1, 2], [3]), a_run([1, 9], [3]))
    assert (changed.equal, changed.total, changed.first_difference) == (2, 3, (0, 1))
    shorter = compare(a_run([1], [3]), a_run([1], [3, 4]))
    assert (shorter.equal, shorter.total, shorter.first_difference) == (2, 3, (1, 1))

"""vLLM's own engine, with and without a pool, over two ranks: the same prompts, the same batches."""

from __future__ import annotations

import pytest
from ranks import run_ranks
from tiny import VOCABULARY, save_tiny

pytestmark = pytest.mark.timeout(900)  # engines start slowly on machines with other work
RANKS = 2
_THINGS = ("a river", "an old map", "the moon", "a violin", "winter")
_FORMS = (
    "Write one sentence about {}.",
    "What is {} made of?",
    "Explain {} to a child.",
    "Give three words for {}.",
    "Tell me a short story in which {} matters.",
    "Translate into French: I dream of {}.",
    "Is {} useful? Answer yes or no.",
    "Who would want {}?",
    "Complete: Yesterday I saw {} and",
    "Make a rhyme with {}.",
)
PROMPTS = [form.format(thing) for form in _FORMS for thing in _THINGS]
POOLED = {"load_format": "sidp", "worker_extension_cls": "sidp.vllm.WorkerExtension"}
PLAIN = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 32,
    "seed": 0,
    "enable_prefix_caching": False,
}
_REQUESTED_BYTES = 2_200_000_000  # of an engine: vLLM takes what its process does not use of it for the KV cache


def jobs(model, prompts, max_tokens=16, ranks=RANKS, **args) -> list[list[dict]]:
    pooled = "worker_extension_cls" in args
    arguments = {"model": str(model), **PLAIN, **args}
    return [
        [{"args": arguments, "prompts": prompts[rank::ranks], "max_tokens": max_tokens, "pooled": pooled}]
        for rank in range(ranks)
    ]


def tokens(results) -> list:
    return [engine["tokens"] for rank in results for engine in rank]


def logprobs(results) -> list:
    return [engine["logprobs"] for rank in results for engine in rank]


@pytest.fixture(scope="module")
def utilization(with_vllm) -> float:
    from vllm.utils.cpu_resource_utils import get_memory_node_info

    return _REQUESTED_BYTES / get_memory_node_info(0).total_memory


@pytest.fixture(scope="module")
def plain(smollm2, utilization, tmp_path_factory):
    """Stock vLLM on the prompts of each rank."""
    return run_ranks(tmp_path_factory.mktemp("plain"), jobs(smollm2, PROMPTS, gpu_memory_utilization=utilization))


@pytest.fixture(scope="module")
def was(smollm2, utilization, tmp_path_factory):
    made = jobs(smollm2, PROMPTS, gpu_memory_utilization=utilization, **POOLED)
    return run_ranks(tmp_path_factory.mktemp("was"), made, SIDP_MODE="was")


def test_was_is_vllm_bit_for_bit(plain, was):
    assert len(PROMPTS) == 50
    assert tokens(was) == tokens(plain)
    assert logprobs(was) == logprobs(plain)
    for rank in was:
        calls = rank[0]["stats"][0]["calls"]
        assert calls["was"] > 0 and calls["cas"] == 0


def test_a_rank_reads_its_share_only(was):
    for rank in was:
        assert rank[0]["ffn_elements_read"] * 4 == rank[0]["stats"][0]["owned_bytes"]
    owned = [rank[0]["stats"][0]["owned_bytes"] for rank in was]
    assert sum(owned) == was[0][0]["stats"][0]["replicated_bytes"]


def test_the_kv_cache_grows_by_what_is_freed(plain, was, smollm2):
    from sidp.planner.capacity import Deployment, pooled, replicated
    from sidp.planner.gpus import GPUS
    from sidp.planner.models import load_model

    deployment = Deployment(model=load_model(str(smollm2), "float32"), gpu=next(iter(GPUS.values())), dp=RANKS)
    with_pool, without = pooled(deployment, "layer"), replicated(deployment)
    for rank in range(RANKS):
        before, after = plain[rank][0]["kv"], was[rank][0]["kv"]
        freed = was[rank][0]["stats"][0]["freed_bytes"]
        assert with_pool.kv_bytes(rank) - without.kv_bytes(rank) == freed
        assert before["block_bytes"] == after["block_bytes"] == before["block_tokens"] * without.kv_bytes_per_token
        grown = before["other_bytes"] - after["other_bytes"]
        # Two roundings down to a block, and what else differs between two processes: a tenth of what is freed.
        assert abs(grown - freed) <= before["block_bytes"] + 0.1 * freed, (grown, freed)


def test_cas(plain, smollm2, tmp_path):
    made = jobs(smollm2, PROMPTS, kv_cache_memory_bytes=500_000_000, **POOLED)
    cas = run_ranks(tmp_path, made, SIDP_MODE="cas")
    assert tokens(cas) == tokens(plain)
    for rank in cas:
        stats = rank[0]["stats"][0]
        assert stats["calls"]["cas"] > 0 and stats["calls"]["was"] == 0
        assert stats["requests_served"] > 0


def test_compiled_in_worker_processes_by_environment_variable(smollm2, plain, tmp_path):
    """vLLM's default set-up: a process for the engine and one for its worker, torch.compile (without Inductor here)."""
    args = {"enforce_eager": False, "kv_cache_memory_bytes": 500_000_000}
    few = [prompt for rank in range(RANKS) for prompt in PROMPTS[rank::RANKS][:4]]
    made = jobs(smollm2, few, 8, worker_extension_cls=POOLED["worker_extension_cls"], **args)
    for rank in range(RANKS):
        made[rank][0]["prompts"] = PROMPTS[rank::RANKS][:4]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_CI_ENV": "1", "SIDP_MODE": "was", "SIDP_VLLM": "1"}
    results = run_ranks(tmp_path, made, **environment)
    for rank in range(RANKS):
        assert results[rank][0]["tokens"] == [answer[:8] for answer in plain[rank][0]["tokens"][:4]]
        stats = results[rank][0]["stats"]
        assert len(stats) == 1 and stats[0]["active"] and stats[0]["calls"]["was"] > 0


FAMILIES = {"llama": {"mlp_bias": True, "attention_bias": True}, "mistral": {}, "qwen2": {}, "qwen3": {}}


def random_prompts(count: int) -> list[list[int]]:
    return [[(31 * i + 7 * j * j) % VOCABULARY for j in range(3 + i % 9)] for i in range(count)]


@pytest.fixture(scope="module")
def families(with_vllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {family: save_tiny(family, folder / family, **changes) for family, changes in FAMILIES.items()}


def one_after_another(*jobs_of_an_engine) -> list[list[dict]]:
    """The engines of several ``jobs`` in one process a rank: starting is what takes the time."""
    return [[made[rank][0] for made in jobs_of_an_engine] for rank in range(RANKS)]


def halves(results) -> tuple[list, list]:
    """The engines without a pool, and as many with one behind them, rank by rank."""
    middle = len(results[0]) // 2
    return [rank[:middle] for rank in results], [rank[middle:] for rank in results]


def test_families_one_engine_after_another(families, tmp_path):
    """The engines of a process follow each other: each makes a pool of its own in the same store."""
    args = {"kv_cache_memory_bytes": 50_000_000, "skip_tokenizer_init": True}
    made = [jobs(model, random_prompts(9), 6, **args, **more) for more in ({}, POOLED) for model in families.values()]
    environment = {"SIDP_MODE": "was", "SIDP_PLACEMENT": "striped", "SIDP_SLOTS": "2"}
    expected, got = halves(run_ranks(tmp_path, one_after_another(*made), **environment))
    assert tokens(got) == tokens(expected)
    assert logprobs(got) == logprobs(expected)
    assert len({str(answer) for answer in tokens(expected)}) == len(families) * RANKS  # the models really differ
    for rank in got:
        assert all(engine["stats"][0]["calls"]["was"] > 0 for engine in rank)


def test_tensor_parallel(families, tmp_path):
    """Two engines of two workers each: worker t of both is one pool."""
    args = {"kv_cache_memory_bytes": 50_000_000, "skip_tokenizer_init": True, "tensor_parallel_size": 2}
    plain, with_pool = (jobs(families["llama"], random_prompts(5), 6, 1, **args, **more) for more in ({}, POOLED))
    expected = run_ranks(tmp_path / "plain", plain) * RANKS  # both engines of a pool get the prompts of this one
    was = run_ranks(tmp_path / "was", with_pool * RANKS, SIDP_MODE="was")
    cas = run_ranks(tmp_path / "cas", with_pool * RANKS, SIDP_MODE="cas")
    assert tokens(was) == tokens(expected) == tokens(cas)
    assert logprobs(was) == logprobs(expected)
    for mode, results in (("was", was), ("cas", cas)):
        for rank in results:
            assert [stats["world_size"] for stats in rank[0]["stats"]] == [2, 2]
            assert all(stats["calls"][mode] > 0 for stats in rank[0]["stats"])

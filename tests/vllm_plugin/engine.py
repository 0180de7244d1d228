"""One rank: runs vLLM engines, one after another, as a job says, and writes what they did.

    python engine.py JOB.json RESULT.json

The job is a list of engines: {"args": LLM's arguments, "prompts": [text or token ids], "max_tokens": n, "pooled": bool}.
"""

import gc
import json
import re
import sys

FFN = re.compile(r"\.mlp\.(gate|up|down)_proj\.")


def count_reads() -> dict[str, int]:
    """Counts, from here on, the elements of FFN tensors that this process reads from checkpoints, by whoever does it."""
    from sidp.hf.checkpoint import Checkpoint

    own, count = Checkpoint.read, {"ffn": 0}

    def read(self, key, index):
        tensor = own(self, key, index)
        count["ffn"] += tensor.numel() if FFN.search(key) else 0
        return tensor

    Checkpoint.read = read
    return count


def kv_cache(llm) -> dict[str, int] | None:
    """Sizes of the KV cache and of what vLLM counted beside it; None where the worker is another process."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    worker = getattr(getattr(core, "model_executor", None), "driver_worker", None)
    if worker is None or not hasattr(worker.worker, "requested_cpu_memory"):
        return None
    worker, cache = worker.worker, llm.llm_engine.vllm_config.cache_config
    held = sum(layer.numel() * layer.element_size() for layer in worker.model_runner.kv_caches)
    return {
        "blocks": cache.num_gpu_blocks,
        "block_tokens": cache.block_size,
        "block_bytes": held // cache.num_gpu_blocks,
        "other_bytes": worker.requested_cpu_memory - held,
    }


def run(engine: dict, reads: dict[str, int]) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    import sidp.vllm

    reads["ffn"] = 0
    llm = LLM(**engine["args"])
    prompts = [text if isinstance(text, str) else {"prompt_token_ids": text} for text in engine["prompts"]]
    sampling = SamplingParams(
        temperature=0, max_tokens=engine["max_tokens"], ignore_eos=True, logprobs=3, detokenize=False
    )
    outputs = [request.outputs[0] for request in llm.generate(prompts, sampling, use_tqdm=False)]
    result = {
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [sorted((token, entry.logprob) for token, entry in step.items()) for step in output.logprobs]
            for output in outputs
        ],
        "kv": kv_cache(llm),
        "ffn_elements_read": reads["ffn"],
    }
    if engine["pooled"]:
        result["stats"] = sidp.vllm.stats(llm)
        sidp.vllm.close(llm)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return result


def main() -> None:
    job, target = sys.argv[1:]
    reads = count_reads()
    with open(job) as file:
        engines = json.load(file)
    results = [run(engine, reads) for engine in engines]
    with open(target, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":  # vLLM's workers import this file again
    main()

"""Ranks that run vLLM engines, one after another, as a job says, and write what they did.

    python engine.py        # reads an order a line, {"ranks": [rank, ...], "timeout_s": s}, and answers each with a line of exit codes

A rank is {"job": JOB.json, "result": RESULT.json, "log": file, "environment": {name: value}}, its job a list of engines:
{"args": LLM's arguments, "prompts": [text or token ids], "max_tokens": n, "pooled": bool}. This process imports vLLM, which takes
a quarter of a minute, once and forks for every rank.
"""

import contextlib
import gc
import json
import os
import re
import signal
import sys
import time
import traceback

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


def run_rank(rank: dict) -> None:
    os.environ.update(rank["environment"])
    reads = count_reads()
    with open(rank["job"]) as file:
        engines = json.load(file)
    results = [run(engine, reads) for engine in engines]
    with open(rank["result"], "w") as file:
        json.dump(results, file)


def start(rank: dict) -> int:
    """Its process, in a session of its own."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        log = os.open(rank["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for mine, theirs in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(mine, theirs)
        run_rank(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(child: int, end: float) -> int | str:
    """Its exit code; afterwards neither it nor a worker of it is left."""
    try:
        while time.monotonic() < end:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "none within the time limit"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)


def main() -> None:
    from vllm import LLM  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        children = [start(rank) for rank in order["ranks"]]
        end = time.monotonic() + order["timeout_s"]
        print(json.dumps([wait(child, end) for child in children]), flush=True)


if __name__ == "__main__":  # vLLM's workers import this file again
    main()

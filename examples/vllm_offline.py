"""Offline throughput with vLLM, eight engines and one pool. Run it with:

    torchrun --nproc-per-node 8 examples/vllm_offline.py MODEL [PROMPTS.txt]

Each rank is an engine of its own on one GPU and takes every eighth prompt. With --tp 2, start half as many ranks.
"""

import argparse
import os
import time

import sidp.vllm


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a folder with safetensors, or a hub id")
    parser.add_argument("prompts", nargs="?", help="a text file, a prompt a line (default: 512 small ones)")
    parser.add_argument("--tp", type=int, default=1, help="GPUs of one engine")
    parser.add_argument("--max-tokens", type=int, default=256)
    args = parser.parse_args()

    sidp.vllm.use_torchrun(args.tp)  # before vLLM is imported: it must not take torchrun's group for its own
    from vllm import LLM, SamplingParams

    rank, world_size = int(os.environ["SIDP_VLLM_RANK"]), int(os.environ["SIDP_VLLM_WORLD_SIZE"])
    if args.prompts:
        with open(args.prompts, encoding="utf-8") as lines:
            prompts = [line.strip() for line in lines if line.strip()]
    else:
        prompts = [f"Tell me something about the number {number}." for number in range(512)]

    llm = LLM(
        args.model,
        tensor_parallel_size=args.tp,
        load_format="sidp",
        worker_extension_cls="sidp.vllm.WorkerExtension",
    )
    begin = time.perf_counter()
    outputs = llm.generate(prompts[rank::world_size], SamplingParams(temperature=0, max_tokens=args.max_tokens))
    seconds = time.perf_counter() - begin
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    stats = sidp.vllm.stats(llm)[0]
    print(
        f"rank {rank}: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s; "
        f"{stats['freed_bytes'] / 1e9:.2f} GB of weights are KV cache now; FFN calls {stats['calls']}\n",
        end="",
    )
    sidp.vllm.close(llm)  # serves the others until all are done


if __name__ == "__main__":  # vLLM's workers import this file again
    main()

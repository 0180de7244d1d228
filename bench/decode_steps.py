"""A decode step of run-batch's engine on one GPU, without a pool: what of it is the GPU's and what the host's.

    python bench/decode_steps.py [--model Qwen3-14B] [--layers 20] [--rows 16 64 128] [--prompt 768] [--ways graphs in-place copied]

Made-up weights. Every request is in its answer while steps are counted; a step is the time in which each gets one token.
  graphs    the cache read in place, steps captured (batch/decode.py)
  in-place  the same steps launched one kernel at a time
  copied    transformers' own way without the flash-attn package: the keys and values of every layer copied out first
`floor` is the step's weights and keys and values over the rate at which this GPU copies its own memory (bytes read and written
count); `busy` what the GPU computed within a step, by torch's profiler; `ratio` = step / floor.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from was_gpu import report

from sidp._native import C
from sidp.batch import decode
from sidp.batch.engine import EngineOptions, PagedEngine, Ticket
from sidp.batch.memory import kv_bytes_per_token
from sidp.batch.records import Defaults, parse_row
from sidp.batch.text import Codec
from sidp.hf.dummy import dummy_model
from sidp.planner.presets import preset

WAYS = ("graphs", "in-place", "copied")
WARM, COUNTED, PROFILED = 16, 32, 4  # steps


def copy_rate() -> float:
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    return 2 * C.cuda_copy_rate(source.data_ptr(), source.nbytes, source.device.index)


def wait_for(engine: PagedEngine, tokens: int) -> float:
    while engine.output_tokens < tokens:
        engine.poll(0.0005)
    return time.perf_counter()


def measure(model, way: str, rows: int, prompt: int) -> dict:
    answer = WARM + COUNTED + 4 * PROFILED
    codec = Codec(None, set(), None, model.config.vocab_size)
    tokens = rows * (prompt + answer + 256)
    options = EngineOptions(
        grouped=True, max_batch=rows, kv_bytes=tokens * kv_bytes_per_token(model), samples=False, filters=False,
        mean_cost=prompt + answer, batch_tokens=4096, graphs=way == "graphs",
    )  # fmt: skip
    engine = PagedEngine(model, codec, options)
    try:
        rng, tickets = random.Random(rows), []
        for n in range(rows):
            ids = [rng.randrange(1, model.config.vocab_size) for _ in range(prompt)]
            row = {"prompt": ids, "max_tokens": answer, "ignore_eos": True}
            tickets.append(Ticket(n, parse_row(json.dumps(row).encode(), n, Defaults()).request, ids, answer))
        engine.submit(tickets)
        begin = wait_for(engine, rows * WARM)
        first = engine.output_tokens
        end = wait_for(engine, first + rows * COUNTED)
        step = (end - begin) / ((engine.output_tokens - first) / rows)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            first = engine.output_tokens
            wait_for(engine, first + rows * PROFILED)
            seen = (engine.output_tokens - first) / rows
        kernels: Counter = Counter()
        for event in profile.key_averages():
            kernels[event.key.split("<")[0].split("(")[0][-60:]] += event.self_device_time_total * 1e-3 / seen
        length = prompt + WARM + COUNTED // 2
        return {"step": step * 1e3, "busy": kernels.total(), "tokens": rows * length, "kernels": kernels.most_common(8)}
    finally:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-14B")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--prompt", type=int, default=768)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    config = {key: value for key, value in preset(args.model).items() if key != "_name"}
    config |= {"num_hidden_layers": args.layers}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model = dummy_model(folder, torch.bfloat16, torch.device("cuda"))
    rate, in_place = copy_rate(), decode.in_place
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    report(device=torch.cuda.get_device_name(), copy_gbps=rate / 1e9, weights_gb=weights / 1e9)
    for rows in args.rows:
        for way in args.ways:
            decode.in_place = (lambda model: False) if way == "copied" else in_place
            made = measure(model, way, rows, args.prompt)
            floor = (weights + made.pop("tokens") * kv_bytes_per_token(model)) / rate * 1e3
            kernels = {name: round(ms, 2) for name, ms in made.pop("kernels")}
            report(rows=rows, way=way, floor=floor, ratio=made["step"] / floor, **made, kernels=kernels)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

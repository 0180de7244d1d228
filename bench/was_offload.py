"""One model whose FFNs do not stay on the GPU, four ways in one run: sidp's host tier, accelerate (cpu_offload of each MLP,
and dispatch_model with as much memory as sidp's ring takes), FSDP2 with CPUOffloadPolicy. Same weights, same batch.

  python bench/was_offload.py [--layers 8 --rows 256 2048 8192]

Prints JSON lines: milliseconds of a forward (medians by CUDA events), GPU memory, and the ratio to sidp.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sidp
from sidp import PoolConfig

SLOTS = 3


def report(**fields):
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in fields.items()}), flush=True)


def build(args):
    """The same model each time, on the GPU."""
    torch.manual_seed(11)
    config = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.inner, num_hidden_layers=args.layers, vocab_size=1024,
        num_attention_heads=args.hidden // 128, num_key_value_heads=max(1, args.hidden // 640),
        max_position_embeddings=32768,
    )  # fmt: skip
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def by_sidp(model):
    pool = sidp.pool_model(model, config=PoolConfig(mode="was", host_tier=True, slots=SLOTS))
    return pool.close


def by_cpu_offload(model):
    from accelerate import cpu_offload

    for layer in model.model.layers:
        cpu_offload(layer.mlp, execution_device=torch.device("cuda", 0))
    return lambda: None


def by_dispatch_model(model):
    """As many MLPs stay on the GPU as the ring has slots, less the one that is on its way."""
    from accelerate import dispatch_model

    kept = SLOTS - 1
    for layer in model.model.layers[kept:]:
        layer.mlp.to("cpu")  # it offloads what it finds, where it finds it: from the GPU to the GPU
    where = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    for index in range(len(model.model.layers)):
        name = f"model.layers.{index}"
        parts = [child for child, _ in model.model.layers[index].named_children()]
        where.update({f"{name}.{part}": "cpu" if part == "mlp" and index >= kept else 0 for part in parts})
    dispatch_model(model, device_map=where, main_device=0)
    return lambda: None


def by_fsdp2(model):
    import torch.distributed as dist
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    for layer in model.model.layers:
        layer.mlp.to("cpu")
        fully_shard(layer.mlp, offload_policy=CPUOffloadPolicy(pin_memory=True), reshard_after_forward=True)
    fully_shard(model, reshard_after_forward=False)  # the root, without which no module is fetched ahead of another
    return dist.destroy_process_group


WAYS = {
    "unpooled": lambda model: lambda: None,
    "sidp": by_sidp,
    "accelerate cpu_offload": by_cpu_offload,
    "accelerate dispatch_model": by_dispatch_model,
    "FSDP2 CPUOffloadPolicy": by_fsdp2,
}


def measure(model, ids, repeats):
    times = []
    for i in range(repeats + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        end.record()
        end.synchronize()
        if i:
            times.append(begin.elapsed_time(end))
    return statistics.median(times), logits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--inner", type=int, default=25600)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[256, 2048, 8192], help="tokens of a forward, one sequence"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    report(what="device", name=torch.cuda.get_device_name(0), torch=torch.__version__, layers=args.layers)
    batches = {n: torch.randint(0, 1024, (1, n), device="cuda") for n in args.rows}
    right, ours = {}, {}
    for way in args.ways:
        gc.collect()
        torch.cuda.empty_cache()
        model = build(args)
        try:
            undo = WAYS[way](model)
            gc.collect()
            torch.cuda.empty_cache()
            for rows, ids in batches.items():
                report(what=way, rows=rows, **forward_of(model, ids, args.repeats, way, right, ours))
        except (RuntimeError, ValueError, TypeError, ImportError, AttributeError) as error:
            if way in ("unpooled", "sidp"):
                raise
            report(what=way, waived=f"{type(error).__name__}: {error}")  # the comparison goes on without this way
            continue
        undo()
        del model, undo


def forward_of(model, ids, repeats, way, right, ours):
    """Figures of one batch; `right` and `ours` keep the unpooled logits and sidp's times by rows."""
    rows = ids.shape[1]
    torch.cuda.reset_peak_memory_stats()
    free, total = torch.cuda.mem_get_info()
    with torch.no_grad():
        ms, logits = measure(model, ids, repeats)
    same = torch.equal(logits, right.setdefault(rows, logits))
    if way == "sidp":
        ours[rows] = ms
        if not same:
            raise SystemExit("sidp's logits are not the unpooled model's: timings would mean nothing")
    ratio = {"over_sidp": ms / ours[rows]} if rows in ours else {}
    gigabytes = {"gpu_gb_before": (total - free) / 1e9, "peak_torch_gb": torch.cuda.max_memory_allocated() / 1e9}
    return {"ms": ms, "equal_to_first": same, **gigabytes, **ratio}


if __name__ == "__main__":
    main()

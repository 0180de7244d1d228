"""What pooling would bring on a node: KV cache, batch, and when fetches are hidden. Needs no GPU and no weights.

Reads a model's config.json (or takes one of the paper's models by name), lays its FFN weights out as a pool would,
and compares it with replicas that hold everything. Rates are datasheet figures cut to what was attained elsewhere,
unless --gpu measured takes them from a profile that `sidp bench --profile FILE` wrote on a GPU (docs/profile.md).

  sidp plan --model Llama-3.1-70B --gpu h200 --dp 8 --tp 1
  sidp plan --model path/to/model --gpu measured --profile h100.json --dp 4 --seq 4096 --json
"""

from __future__ import annotations

import argparse

from ..errors import ConfigError
from .checks import need, plot_target, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME|PATH",
        help="Qwen3-32B, Llama-3.1-70B, Qwen2.5-72B, Llama-3.1-8B, a config.json, or a folder that holds one",
    )
    parser.add_argument("--gpu", required=True, metavar="h20|h20-141|h100|h200|b200|measured", help="the GPU's kind")
    parser.add_argument("--profile", metavar="FILE.json", help="the measured rates, for --gpu measured")
    parser.add_argument("--dp", type=positive, required=True, metavar="N", help="replicas that share the pool")
    parser.add_argument("--tp", type=positive, default=1, metavar="N", help="GPUs of a replica (default: 1)")
    parser.add_argument("--placement", choices=("layer", "striped"), help="plan this placement (default: both)")
    parser.add_argument("--slots", type=positive, metavar="N", help="ring slots (default: what sidp would choose)")
    parser.add_argument(
        "--backup",
        choices=("peer", "host", "file"),
        help="count a second copy of every unit, so that the group survives a loss (default: none)",
    )
    parser.add_argument(
        "--seq",
        type=positive,
        default=1024,
        metavar="N",
        help="tokens of a request, prompt and answer (default: 1024)",
    )
    parser.add_argument(
        "--prompt", type=int, metavar="N", help="tokens of a request's prompt, for the speed (default: half of --seq)"
    )
    parser.add_argument(
        "--utilization", type=float, default=0.9, metavar="X", help="share of memory the engine may use (default: 0.9)"
    )
    parser.add_argument(
        "--batched-tokens",
        type=positive,
        default=8192,
        metavar="N",
        help="rows of the largest forward, which sizes the activations (default: 8192)",
    )
    parser.add_argument(
        "--reserve-gib",
        type=float,
        default=1.0,
        metavar="X",
        help="GiB for the CUDA context, NCCL and workspaces (default: 1)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of weights and KV cache (default: the config's)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON instead of tables")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the memory of a GPU and the crossover")


def run(args: argparse.Namespace) -> int:
    """Exit code 0, whatever the plan advises."""
    need("plan", *(() if args.json else ("rich",)), *(("matplotlib",) if args.plot else ()))
    plot_target(args.plot)
    from ..planner.advice import make_plan
    from ..planner.capacity import Deployment
    from ..planner.gpus import load_gpu
    from ..planner.models import load_model
    from ..planner.report import print_json, print_tables

    if not 0 <= args.reserve_gib < 1e6:
        raise ConfigError(f"--reserve-gib must be 0 or more, got {args.reserve_gib}")
    deployment = Deployment(
        model=load_model(args.model, args.dtype),
        gpu=load_gpu(args.gpu, args.profile),
        dp=args.dp,
        tp=args.tp,
        seq=args.seq,
        prompt=args.prompt,
        utilization=args.utilization,
        batched_tokens=args.batched_tokens,
        reserve_bytes=int(args.reserve_gib * 2**30),
        backup=args.backup,
    )
    plan = make_plan(deployment, args.placement, args.slots)
    if args.plot:
        from ..planner.figure import plot_plan

        plot_plan(plan, args.plot)
    if args.json:
        print_json(plan)
    else:
        print_tables(plan)
        if args.plot:
            print(f"drawn: {args.plot}")
    return 0

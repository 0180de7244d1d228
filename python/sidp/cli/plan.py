"""What pooling would bring on a node: KV cache, batch, and when fetches are hidden. Needs no GPU and no weights.

Reads a model's config.json (or takes one of the paper's models by name), lays its FFN weights out as a pool would,
and compares it with replicas that hold everything. Rates are datasheet figures cut to what was attained elsewhere,
unless --gpu measured takes them from a profile that `sidp bench --profile FILE` wrote on a GPU (docs/profile.md).

  sidp plan --model Llama-3.1-70B --gpu h200 --dp 8 --tp 1
  sidp plan --model path/to/model --gpu measured --profile h100.json --dp 4 --seq 4096 --json

With --crossover it does the one thing that has to be measured: it starts --dp ranks on this machine, runs iterations of
one rank in both modes, the others idle, and prints from how many rows on WaS is faster than CaS, predicted and measured.

  sidp plan --crossover --dp 2 --hidden 512 --inner 2048 --layers 8 --link-gbps 0.5
"""

from __future__ import annotations

import argparse
import json

from ..errors import ConfigError
from .checks import need, plot_target, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME|PATH",
        help="Qwen3-32B, Llama-3.1-70B, Qwen2.5-72B, Llama-3.1-8B, a config.json, or a folder that holds one",
    )
    parser.add_argument("--gpu", metavar="h20|h20-141|h100|h200|b200|measured", help="the GPU's kind")
    parser.add_argument("--profile", metavar="FILE.json", help="the measured rates, for --gpu measured")
    parser.add_argument("--dp", type=positive, required=True, metavar="N", help="replicas that share the pool")
    parser.add_argument("--tp", type=positive, default=1, metavar="N", help="GPUs of a replica (default: 1)")
    parser.add_argument("--placement", choices=("layer", "striped"), help="plan this placement (default: both)")
    parser.add_argument("--slots", type=positive, metavar="N", help="ring slots (default: what sidp would choose)")
    parser.add_argument(
        "--backup",
        choices=("peer", "host"),
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
    crossover = parser.add_argument_group("measuring here (with --crossover; --model and --gpu are not needed)")
    crossover.add_argument("--crossover", action="store_true", help="run both modes on this machine's ranks")
    crossover.add_argument("--hidden", type=positive, default=512, metavar="N", help="of the FFN (default: 512)")
    crossover.add_argument("--inner", type=positive, default=2048, metavar="N", help="of the FFN (default: 2048)")
    crossover.add_argument("--layers", type=positive, default=8, metavar="N", help="of an iteration (default: 8)")
    crossover.add_argument(
        "--rows", type=positive, nargs="+", metavar="N", help="to run, ascending (default: 1 ... 512)"
    )
    crossover.add_argument(
        "--link-gbps", type=float, metavar="X", help="cap that stands for the link on the CPU (default there: 0.5)"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0, whatever the plan advises."""
    if args.crossover:
        return _crossover(args)
    missing = [name for name in ("model", "gpu") if getattr(args, name) is None]
    if missing:
        raise ConfigError(f"sidp plan needs --{' and --'.join(missing)}, or --crossover to measure on this machine")
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


def _crossover(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    import torch

    from .._native import C
    from ..config import FFNSpec
    from ..planner.measured import ROWS, measure, print_crossover

    on_gpu = C.with_cuda and torch.cuda.is_available()
    link = args.link_gbps if args.link_gbps is not None or on_gpu else 0.5
    if link is not None and not 0 < link < 1e6:
        raise ConfigError(f"--link-gbps must be a positive number, got {link}")
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    spec = FFNSpec(args.hidden, args.inner, dtype=dtype)
    placement = args.placement or "layer"
    found = measure(spec, args.layers, args.dp, placement, args.rows or ROWS, link)
    if args.json:
        print(json.dumps(asdict(found), indent=2))
        return 0
    capped = "" if on_gpu else f", {link:g} GB/s a rank"
    print_crossover(
        found,
        f"{args.dp} ranks, {placement} placement, {args.layers} layers of {args.hidden} x {args.inner} {str(dtype)[6:]}{capped}",
    )
    return 0

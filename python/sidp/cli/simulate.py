"""Whole jobs in simulated time, on a node that need not be at hand. Needs no GPU and no weights.

Compares replicas with a pool in each placement (or simulates what is asked for), or repeats the paper's experiments and the
studies of docs/simulate.md. Rates are datasheet rooflines cut to what was attained elsewhere, unless --gpu measured takes
them from a profile (docs/profile.md). The ring's order and the choice of mode are the pool's own native code.

  sidp simulate --model Llama-3.1-70B --gpu h200 --dp 8 --requests 1000 --prompt 512 --answer 512
  sidp simulate --model Qwen3-32B --gpu h20-141 --dp 8 --mode was --placement striped --link-gbps 50 --json
  sidp simulate --paper ladder causes --out docs/img   # tables on standard output, plots into the folder; none named: all, 20 minutes
"""

from __future__ import annotations

import argparse
import json
import os
import time

from ..errors import ConfigError
from .checks import need, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--paper",
        nargs="*",
        metavar="PART",
        help="the paper's experiments and the studies instead of a job: capacity fetch throughput shifting ladder "
        "switching causes placements sizes links choices (default: all)",
    )
    parser.add_argument("--out", metavar="FOLDER", help="with --paper: where the plots go (default: none are drawn)")
    parser.add_argument("--model", metavar="NAME|PATH", help="as in sidp plan")
    parser.add_argument("--gpu", metavar="h20|h20-141|h100|h200|b200|measured", help="the GPU's kind")
    parser.add_argument("--profile", metavar="FILE.json", help="the measured rates, for --gpu measured")
    parser.add_argument("--dp", type=positive, default=8, metavar="N", help="replicas that share the pool (default: 8)")
    parser.add_argument("--tp", type=positive, default=1, metavar="N", help="GPUs of a replica (default: 1)")
    parser.add_argument("--stages", type=positive, default=1, metavar="N", help="of a pipeline, with --mode local")
    parser.add_argument(
        "--mode", choices=("local", "was", "cas", "auto", "gather"), help="default: replicas, and pools in auto"
    )
    parser.add_argument("--placement", choices=("layer", "striped"), help="default: both")
    parser.add_argument("--slots", type=positive, metavar="N", help="ring slots (default: what sidp would choose)")
    parser.add_argument("--requests", type=positive, default=1000, metavar="N", help="of the job (default: 1000)")
    parser.add_argument("--prompt", type=positive, default=512, metavar="N", help="tokens, the mean (default: 512)")
    parser.add_argument("--answer", type=positive, default=512, metavar="N", help="tokens, the mean (default: 512)")
    parser.add_argument(
        "--spread",
        type=float,
        default=0.5,
        metavar="X",
        help="lengths from mean * (1 - X) to mean * (1 + X) (default: 0.5)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of lengths and jitter (default: 0)")
    parser.add_argument(
        "--utilization", type=float, default=0.9, metavar="X", help="of the GPU's memory (default: 0.9)"
    )
    parser.add_argument("--link-gbps", type=float, metavar="X", help="of each rank's link, GB/s (default: the GPU's)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    if args.paper is not None:
        need("simulate", *(("matplotlib",) if args.out else ()))
        from ..simulate.report import PARTS, print_parts

        for part in args.paper:
            if part not in PARTS:
                raise ConfigError(f"--paper {part}: expected one of {', '.join(PARTS)}")
        if args.out and not os.access(args.out, os.W_OK | os.X_OK):  # said now, not after minutes
            raise ConfigError(f"--out {args.out}: expected a folder that exists and can be written; create it first")
        print_parts(args.paper, args.out)
        return 0
    if args.model is None or args.gpu is None:
        raise ConfigError("a job needs --model and --gpu; --paper needs neither")
    rows = [_simulate(args, setup) for setup in _setups(args)]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    print("  ".join(name.rjust(max(len(name), 9)) for name in rows[0]))
    for row in rows:
        cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
        print("  ".join(cell.rjust(max(len(name), 9)) for name, cell in zip(row, cells, strict=True)))
    return 0


def _setups(args: argparse.Namespace) -> list:
    from ..planner.capacity import Deployment
    from ..planner.gpus import load_gpu
    from ..planner.models import load_model
    from ..simulate.machine import Fabric
    from ..simulate.setup import Setup

    if args.link_gbps is not None and not 0 < args.link_gbps < 1e6:
        raise ConfigError(f"--link-gbps must be above 0, got {args.link_gbps}")
    seq = int((args.prompt + args.answer) * (1 + args.spread)) + 1
    deployment = Deployment(
        load_model(args.model), load_gpu(args.gpu, args.profile), args.dp, args.tp, seq=seq, prompt=args.prompt,
        utilization=args.utilization,
    )  # fmt: skip
    common = {
        "deployment": deployment, "slots": args.slots, "seed": args.seed, "stages": args.stages,
        "fabric": Fabric(args.link_gbps, args.link_gbps),
    }  # fmt: skip
    placements = (args.placement,) if args.placement else ("layer", "striped")
    if args.mode == "local":
        return [Setup(mode="local", **common)]
    if args.mode:
        return [Setup(mode=args.mode, placement=placement, **common) for placement in placements]
    return [Setup(mode="local", **common), *(Setup(mode="auto", placement=p, **common) for p in placements)]


def _simulate(args: argparse.Namespace, setup) -> dict:
    from ..simulate import workload
    from ..simulate.setup import run as simulate

    requests = workload.job(
        args.requests, args.prompt, args.answer, spread=args.spread, seed=args.seed, ranks=setup.deployment.dp
    )
    row = {"mode": setup.mode, "placement": "-" if setup.mode == "local" else setup.placement}
    began = time.perf_counter()
    try:
        outcome = simulate(setup, requests)
    except ConfigError as error:
        if args.mode:
            raise
        return {**row, "note": " ".join(str(error).split())}
    ranks = outcome.native.ranks
    return {
        **row,
        "seconds": outcome.seconds,
        "tokens/s": outcome.tokens_per_s,
        "iteration_ms": outcome.iteration_s * 1e3,
        "stalled": outcome.stalled,
        "cas_share": sum(r.cas_iterations for r in ranks) / sum(r.iterations for r in ranks),
        "fetched_GB": outcome.fetched_bytes / 1e9,
        "kv_tokens": sum(outcome.kv_tokens),
        "simulated_in_s": time.perf_counter() - began,
    }

"""Answer a file of requests with a model, over a pool of FFN weights.

Reads OpenAI batch lines (chat completions and completions) and plain {"prompt": ...} lines, or Parquet with such
columns, and appends one line to the output for each request as it finishes, in OpenAI's batch output form.
Starts --dp ranks, or joins the ranks of torchrun. A shared queue hands out the longest requests first.

A file that was cut, by whatever, goes on with --resume: nothing is lost and nothing is done twice.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from ..errors import ConfigError
from .checks import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--input", required=True, metavar="FILE", help="requests: JSON lines or Parquet")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="answers: JSON lines, appended")
    parser.add_argument(
        "--model", required=True, metavar="PATH|smollm2|random", help="a folder of safetensors, or a small model"
    )
    parser.add_argument("--dp", type=positive, metavar="N", help="ranks to start (default: 2, or torchrun's)")
    parser.add_argument("--resume", action="store_true", help="go on with an output that was cut")
    parser.add_argument("--overwrite", action="store_true", help="start over, dropping what the output holds")
    parser.add_argument(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="dummy: made-up weights of the shape that --model's config.json, or a name that sidp plan knows, says",
    )
    _generation(parser.add_argument_group("where a request does not say"))
    _engine(parser.add_argument_group("engine"))
    _pool(parser.add_argument_group("pool"))
    watching = parser.add_argument_group("watching")
    watching.add_argument("--metrics-port", type=_port, metavar="P", help="serve Prometheus there (0: any free port)")
    watching.add_argument(
        "--metrics-host", default="127.0.0.1", metavar="H", help="address for it (default: 127.0.0.1)"
    )
    watching.add_argument("--summary", metavar="FILE", help="write the JSON summary there, not to standard output")
    watching.add_argument("--quiet", action="store_true", help="no progress on standard error")


def _generation(group) -> None:
    group.add_argument(
        "--max-tokens", type=positive, default=256, metavar="N", help="tokens to generate at most (default: 256)"
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, the likeliest token")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: 1")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the run (default: 0)")
    group.add_argument("--chat", action="store_true", help="a plain prompt is a user's message, not text to go on with")


def _engine(group) -> None:
    group.add_argument(
        "--backend", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where it works"
    )
    group.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="default: the checkpoint's"
    )
    group.add_argument(
        "--batching",
        choices=("auto", "continuous", "grouped", "padded"),
        default="auto",
        help="continuous: requests join and leave at every step; grouped: fixed groups, so that greedy tokens do not "
        "depend on timing; padded: for models that neither can run (default: continuous on CUDA, grouped on the CPU)",
    )
    group.add_argument("--max-batch", type=positive, metavar="N", help="requests in one batch at most (default: KV's)")
    group.add_argument("--group-size", type=positive, default=8, metavar="N", help="requests in a group (default: 8)")
    group.add_argument(
        "--kv-memory-gib",
        type=float,
        metavar="G",
        help="KV cache of a rank (default: its part of the GPU; 0.5 on CPUs)",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        metavar="U",
        help="part of a GPU's memory that its ranks may use in all, split evenly among them (default: 0.9)",
    )
    group.add_argument(
        "--max-batched-tokens",
        type=positive,
        metavar="N",
        help="prompt and new tokens of one step at most (default: 2048, 512 on CPUs)",
    )
    group.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs for decode steps")


def _pool(group) -> None:
    group.add_argument("--no-pool", action="store_true", help="every rank keeps all weights, for comparison")
    group.add_argument("--mode", choices=("auto", "was", "cas", "local"), help="default: auto")
    group.add_argument("--placement", choices=("layer", "striped"), help="default: layer")
    group.add_argument("--slots", type=positive, metavar="N", help="slots of the ring (default: sidp chooses)")
    group.add_argument("--host-tier", action="store_true", help="FFN weights lie in pinned host memory (CUDA)")
    group.add_argument(
        "--redundancy",
        type=int,
        choices=(0, 1),
        help="1: go on when a rank is lost, and answer its requests (default: 0)",
    )
    group.add_argument(
        "--backup", choices=("peer", "host", "file"), help="where second copies are then (default: peer)"
    )
    group.add_argument("--resident-layers", type=int, metavar="N", help="layers that every rank keeps (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when every request is answered and no rank failed; 1 otherwise."""
    # Nothing here may reach for a hub: the ranks inherit these.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from ..batch import run as batch

    options = _options(args, batch)
    if batch.in_torchrun():
        if args.dp is not None and args.dp != int(os.environ["WORLD_SIZE"]):
            raise ConfigError(
                f"--dp {args.dp} in a group of {os.environ['WORLD_SIZE']} that torchrun started: leave --dp out"
            )
        summary = batch.run_in_torchrun(options)
        if summary is None:
            return 0
    else:
        try:
            summary = batch.run(options)
        except KeyboardInterrupt:
            batch.metrics.say(f"what was answered is in {args.output}; go on with --resume")
            raise
    return _report(args, batch, summary)


def _report(args: argparse.Namespace, batch, summary: dict) -> int:
    told = {name: value for name, value in summary.items() if args.summary or name != "timeline"}  # too long to be read
    text = json.dumps(told)
    if args.summary:
        with open(args.summary, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    else:
        print(text)
    for rank, reason in summary["failed_ranks"].items():
        batch.metrics.say(f"error: rank {rank} failed: {reason}")
    left = summary["requests"]["unanswered"]
    if left:
        batch.metrics.say(f"{left} requests are not answered; what {args.output} holds is whole: go on with --resume")
    return 1 if left or summary["failed_ranks"] else 0


def _options(args: argparse.Namespace, batch):
    from ..batch.records import Defaults
    from .models import ModelSource, resolve

    if args.resume and args.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other: go on with the output, or start over")
    if not 0 <= args.temperature <= 2 or not 0 <= args.top_p <= 1:
        raise ConfigError("--temperature must be in 0 ... 2 and --top-p in 0 ... 1")
    if args.summary and not os.path.isdir(os.path.dirname(os.path.abspath(args.summary))):
        raise ConfigError(f"--summary {args.summary}: its folder does not exist; create it first")
    if not 0 < args.gpu_memory_utilization <= 1:
        raise ConfigError(f"--gpu-memory-utilization must be above 0 and at most 1, got {args.gpu_memory_utilization}")
    if args.load_format == "dummy":
        model = ModelSource(args.model, _known(args.model))
    else:
        model = resolve(args.model, lambda line: print(line, file=sys.stderr, flush=True))
    names = ("mode", "placement", "slots", "resident_layers", "redundancy", "backup")
    return batch.Options(
        input=args.input,
        output=args.output,
        model=model.path,
        model_name=model.name,
        ranks=args.dp or 2,
        resume=args.resume,
        overwrite=args.overwrite,
        pooled=not args.no_pool,
        load_format=args.load_format,
        pool_config={
            **{name: getattr(args, name) for name in names if getattr(args, name) is not None},
            **({"host_tier": True} if args.host_tier else {}),
        },
        backend=args.backend,
        dtype=args.dtype,
        batching=args.batching,
        max_batch=args.max_batch,
        group=min(args.group_size, args.max_batch or args.group_size),
        kv_bytes=None if args.kv_memory_gib is None else int(args.kv_memory_gib * 2**30),
        utilization=args.gpu_memory_utilization,
        batch_tokens=args.max_batched_tokens,
        graphs=not args.enforce_eager,
        defaults=Defaults(args.max_tokens, args.temperature, args.top_p, args.seed, args.chat),
        metrics_host=args.metrics_host,
        metrics_port=args.metrics_port,
        progress=not args.quiet,
    )


def _known(model: str) -> str:
    """For --load-format dummy: a path made absolute, or a model's name. ConfigError where it is neither."""
    from ..planner.models import load_model

    load_model(model)
    return str(Path(model).resolve()) if Path(model).exists() else model


def _port(text: str) -> int:
    value = int(text) if text.strip().isdigit() else -1
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 ... 65535")
    return value

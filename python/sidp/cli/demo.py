"""Answer prompts over a pool of FFN weights on this machine, and check every token.

Starts --dp ranks, each with its own replica of the attention and its share of the FFN weights. Every rank
serves its own prompts and fetches the layers it lacks from the others' memory, ahead of use. Afterwards the
same prompts run through the unpooled model, and every token must be equal.
"""

from __future__ import annotations

import argparse
import os
import sys

from .checks import need, plot_target, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="smollm2",
        metavar="smollm2|PATH|random",
        help="SmolLM2-135M-Instruct (converted once into the cache folder), a folder of safetensors, "
        "or a tiny random Llama (default: smollm2)",
    )
    parser.add_argument("--dp", type=positive, default=2, metavar="N", help="ranks to start (default: 2)")
    parser.add_argument(
        "--prompts", metavar="FILE", help="one prompt a line, or JSONL with 'prompt' (default: HumanEval's)"
    )
    parser.add_argument(
        "--max-prompts", type=positive, default=16, metavar="N", help="take the first N prompts (default: 16)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=48, metavar="N", help="at most N tokens an answer (default: 48)"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="prompts a rank answers at once (default: 8)"
    )
    parser.add_argument(
        "--placement",
        choices=("layer", "striped"),
        default="layer",
        help="each layer on one rank, or a stripe of every layer on every rank (default: layer)",
    )
    parser.add_argument(
        "--slots",
        type=positive,
        metavar="N",
        help="slots of the ring that layers are fetched into (default: sidp chooses)",
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw rank 0's fetches, compute and ring over time")
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="skip the unpooled run and the comparison of tokens"
    )
    parser.add_argument("--json", action="store_true", help="print the figures and answers as JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or 1 if a token differs from the unpooled model's."""
    extras = (*(() if args.json else ("rich",)), *(("matplotlib",) if args.plot else ()))
    need("demo", "transformers", "tqdm", *extras, install="'sidp[demo]'")
    plot_target(args.plot)
    # Nothing here may reach for a hub: the ranks inherit these.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
    from ..launch import launch
    from . import demo_report
    from .demo_rank import Job, serve
    from .models import resolve
    from .prompts import load_prompts

    prompts, origin = load_prompts(args.prompts, args.max_prompts)
    model = resolve(args.model, _say)
    job = Job(
        model,
        tuple(prompts),
        args.batch_size,
        args.max_new_tokens,
        args.placement,
        args.slots,
        args.verify,
        0 if args.plot else None,
    )
    _say(
        f"{model.name}: {len(prompts)} prompts ({origin}) over {args.dp} rank{'s' if args.dp > 1 else ''}; loading ..."
    )
    with ProgressBars(len(prompts) * args.max_new_tokens) as bars:
        reports = launch(serve, args.dp, (job,), on_message=bars.update)
    if args.plot:
        from ..plot import plot_timeline

        plot_timeline(
            reports[0].trace, args.plot, title=f"{model.name}, rank 0 of {args.dp}, {args.placement} placement"
        )
    if args.json:
        demo_report.print_json(job, reports)
    else:
        demo_report.print_tables(job, reports)
        if args.plot:
            print(f"timeline of rank 0: {args.plot}")
    return 0 if demo_report.all_equal(reports) else 1


class ProgressBars:
    """One bar a phase, all ranks together, in tokens and tokens/s, on standard error."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._bars: dict[str, object] = {}

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *_) -> None:
        for bar in self._bars.values():
            bar.close()

    def update(self, rank: int, progress) -> None:
        """Add one rank's `demo_rank.Progress`."""
        from tqdm import tqdm

        bar = self._bars.get(progress.phase)
        if bar is None:
            # smoothing=0: the rate shown is the mean since the first token, which the table repeats
            bar = tqdm(total=self._total, desc=f"{progress.phase:>8}", unit="tok", smoothing=0, file=sys.stderr)
            self._bars[progress.phase] = bar
        bar.total -= progress.unspent
        bar.update(progress.tokens)
        if bar.n >= bar.total:
            bar.close()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

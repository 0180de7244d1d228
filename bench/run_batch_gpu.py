"""`sidp run-batch` replicated against pooled, on one GPU or two, in the manner of `vllm bench throughput`.

Made-up weights of real shapes, prompts of a fixed number of random tokens, answers of a fixed length (end tokens are
ignored), greedy. A row is one `sidp run-batch`: its KV tokens, peak batch, output tokens/s from the first request taken
to the last settled, preemptions and tail (time with under 5 % of the requests left). Rows of one `pair` differ in the
pool alone; their answers are compared. Ranks that share a GPU run under an MPS of this script's own.

    python bench/run_batch_gpu.py --budget-s 200 --json OUT.json              # several ranks on one GPU
    python bench/run_batch_gpu.py --suite host --budget-s 120                 # one rank, FFN weights in host memory
    python bench/run_batch_gpu.py --devices 2 --budget-s 240                  # one rank on each of two GPUs, or of 4 or 8
    python bench/run_batch_gpu.py --dry-run                                   # tiny shapes on the CPU

A row for which the time left does not suffice is skipped and says so; one that does not fit the memory says that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from answers import answers_of
from run_batch_device import device_memory, environment, measure_context, mps
from run_batch_rows import TINY, Row, host_tier, node, one_gpu, shortened, small, two_gpus

HERE = Path(__file__).resolve().parent

# ---- one row --------------------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.end = time.monotonic() + args.budget_s
        self.answers: dict[str, dict[str, str]] = {}
        self.device: dict[tuple[int, bool], tuple[int, int]] = {}

    def run(self, row: Row) -> dict:
        """The row as plain values: figures, or `status` with the reason why there are none."""
        result = {**asdict(row), "status": "ok"}
        left = self.end - time.monotonic()
        if left < row.estimate_s:
            return {**result, "status": f"skipped: {left:.0f} s left, about {row.estimate_s:.0f} needed"}
        folder = self._folder(row)
        begin = time.monotonic()
        try:
            limit_s = left if self.args.dry_run else min(left, 2 * row.estimate_s)
            summary = self._execute(row, folder, limit_s)
        except RowFailed as error:
            return {**result, "status": str(error), "row_s": round(time.monotonic() - begin, 1)}
        result |= summary
        result["row_s"] = round(time.monotonic() - begin, 1)
        self._compare(row, folder / "out.jsonl", result)
        return result

    def _folder(self, row: Row) -> Path:
        folder = self.scratch / row.name.replace("/", " of ")
        folder.mkdir(exist_ok=True)
        return folder

    def _execute(self, row: Row, folder: Path, limit_s: float) -> dict:
        self._write_input(row, folder / "in.jsonl")
        model = self._model(row, folder)
        summary = folder / "summary.json"
        words = [
            "-i", folder / "in.jsonl", "-o", folder / "out.jsonl", "--model", model, "--load-format", "dummy",
            "--dp", row.ranks, "--max-batch", row.max_batch, "--summary", summary, "--quiet",
            "--backend", "cpu" if self.args.dry_run else "cuda", "--gpu-memory-utilization", row.utilization,
            *([] if row.pooled else ["--no-pool"]), *row.options,
        ]  # fmt: skip
        program = ["-m", "sidp.cli", "run-batch"]
        if row.offload:
            program = [str(HERE / "run_batch_offload.py")]
        if row.tp > 1:
            program = [str(HERE / "run_batch_tp.py"), "--tp", str(row.tp)]
        process = subprocess.Popen(
            [sys.executable, *program, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            _, stderr = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=15)
            process.kill()
            done = (folder / "out.jsonl").read_bytes().count(b"\n") if (folder / "out.jsonl").exists() else 0
            raise RowFailed(f"stopped after {limit_s:.0f} s with {done} of {row.requests} requests answered") from None
        reasons = [
            line for line in stderr.splitlines() if "error" in line.lower() or "fit" in line
        ] or stderr.splitlines()
        if any("does not fit" in line or "OutOfMemory" in line or "out of memory" in line for line in reasons):
            raise RowFailed("does not fit: " + next(line for line in reasons if "fit" in line or "emory" in line)[:300])
        if process.returncode != 0 or not summary.exists():
            raise RowFailed(f"failed ({process.returncode}): " + " | ".join(reasons[-4:])[:800])
        told = json.loads(summary.read_text())
        if told["requests"]["succeeded"] != row.requests:
            raise RowFailed(f"failed: {told['requests']}")
        return _figures(told)

    def _write_input(self, row: Row, path: Path) -> None:
        rng = random.Random(row.pair)  # rows of a pair get the same prompts
        from sidp.planner.presets import preset

        vocabulary = (TINY if self.args.dry_run else preset(row.model))["vocab_size"]
        with open(path, "w") as file:
            for number in range(row.requests):
                tokens = [rng.randrange(1, vocabulary) for _ in range(row.prompt)]
                request = {"id": f"r{number}", "prompt": tokens, "max_tokens": row.answer, "ignore_eos": True}
                file.write(json.dumps(request) + "\n")

    def _model(self, row: Row, folder: Path) -> str | Path:
        from sidp.planner.presets import preset

        if row.layers is None and not self.args.dry_run:
            return row.model
        config = dict(TINY if self.args.dry_run else preset(row.model))
        config.pop("_name", None)
        if row.layers is not None:
            config["num_hidden_layers"] = row.layers
        config["architectures"] = ["Qwen3ForCausalLM"]
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    # ---- what a row is compared with ------------------------------------------------------------------------------

    def _compare(self, row: Row, output: Path, result: dict) -> None:
        """With the first row of the pair: requests whose answers are equal, and tokens before the first difference."""
        mine = {name: answer.text for name, answer in answers_of(output).items()}
        # Tensor parallelism adds in another order: the others are not compared with it.
        first = self.answers.get(row.pair) if row.tp > 1 else self.answers.setdefault(row.pair, mine)
        if first is None or first is mine:
            return
        both = [name for name in mine if name in first]
        result["same_answers"] = f"{sum(mine[name] == first[name] for name in both)} of {len(both)}"
        prefixes = [_common(mine[name].split(), first[name].split()) / row.answer for name in both]
        result["same_tokens"] = round(sum(prefixes) / max(1, len(prefixes)), 4)

    def predict(self, row: Row, result: dict) -> None:
        """What `sidp plan` says of the KV tokens, from the config, the device's memory and a context's size.

        To measure the latter takes 20 s, once for pooled rows and once for others, which `--no-plan` saves.
        """
        skipped = self.args.dry_run or self.args.no_plan or result["status"] != "ok"
        if skipped or row.offload or row.tp > 1 or "--host-tier" in row.options:
            return
        from sidp.planner.capacity import Deployment, pooled, replicated
        from sidp.planner.gpus import GPU
        from sidp.planner.models import load_model

        several = row.ranks > row.ranks_per_gpu
        eager = row.pooled and several and not {"was", "--enforce-eager"} & set(row.options)  # as run-batch decides
        context, memory = self._device(row.ranks_per_gpu, eager)
        deployment = Deployment(
            model=load_model(str(self._model(row, self._folder(row)))),
            gpu=GPU("measured", memory, 3e12, 6e14, 3.75e11, "this device"),
            dp=row.ranks,
            seq=row.prompt + row.answer,
            utilization=row.utilization,
            batched_tokens=2048,
            reserve_bytes=context,
            ranks_per_gpu=row.ranks_per_gpu,
            sampled=row.max_batch,
            engine="transformers",
        )
        kind = "striped" if "striped" in row.options else "layer"
        plan = pooled(deployment, kind) if row.pooled else replicated(deployment)
        result["predicted_kv_tokens"] = plan.node_kv_tokens
        result["context_bytes"] = deployment.reserve_bytes
        if plan.node_kv_tokens:
            result["measured_to_predicted"] = round(result["kv_tokens"] / plan.node_kv_tokens, 4)

    def _device(self, ranks: int, eager: bool) -> tuple[int, int]:
        """Measured here: (bytes that one of `ranks` processes on a GPU takes before it holds anything, the GPU's)."""
        if (ranks, eager) not in self.device:
            self.device[ranks, eager] = measure_context(ranks, eager)
        return self.device[ranks, eager]


class RowFailed(Exception):
    """The message is the row's status."""


def _figures(summary: dict) -> dict:
    ranks = summary["per_rank"]
    return {
        "kv_tokens": summary["kv_capacity_tokens"],
        "peak_batch": summary["peak_running"],
        "output_tokens_per_s": summary["output_tokens_per_s"],
        "prompt_tokens_per_s": summary["prompt_tokens_per_s"],
        "output_tokens": summary["output_tokens"],
        "generation_s": summary["generation_seconds"],
        "tail_s": summary["tail_seconds"],
        "preemptions": summary["preemptions"],
        "kv_peak_tokens": summary["kv_peak_tokens"],
        "mode_shares": summary["mode_shares"],
        "ring_stall_s": summary["ring_stall_seconds"],
        "freed_bytes": sum(rank["freed_bytes"] for rank in ranks),
        "fetched_bytes": sum(rank["fetched_bytes"] for rank in ranks),
        "ring_bytes": sum(rank["ring_bytes"] for rank in ranks),
        "steps": {
            name: round(sum(rank[name] for rank in ranks), 3)
            for name in ranks[0]
            if "step" in name or "capture" in name
        },
        "cas_up_to_rows": [rank["cas_up_to_rows"] for rank in ranks],
        "was_from_rows": [rank["was_from_rows"] for rank in ranks],
        "timeline": summary["timeline"],
        "load_s": round(max(rank["load_seconds"] for rank in ranks), 1),
    }


def _common(a: list[str], b: list[str]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---- the table ------------------------------------------------------------------------------------------------------

_COLUMNS = (
    ("row", 30), ("KV tok", 9), ("batch", 6), ("tok/s", 8), ("x", 5), ("tail s", 7), ("preempt", 7), ("same", 10),
    ("tok=", 6), ("plan", 6), ("s", 5),
)  # fmt: skip


def print_table(results: list[dict]) -> None:
    print(" ".join(f"{title:>{width}}" for title, width in _COLUMNS))
    base: dict[str, float] = {}
    for r in results:
        if r["status"] != "ok":
            print(f"{r['name']:>30} {r['status']}")
            continue
        first = base.setdefault(r["pair"], r["output_tokens_per_s"])
        cells = (
            r["name"], f"{r['kv_tokens']:,}", r["peak_batch"], f"{r['output_tokens_per_s']:.0f}",
            f"{r['output_tokens_per_s'] / first:.2f}" if first else "-", f"{r['tail_s']:.1f}", r["preemptions"],
            r.get("same_answers", "-"), r.get("same_tokens", "-"), r.get("measured_to_predicted", "-"), r["row_s"],
        )  # fmt: skip
        print(" ".join(f"{cell!s:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1, choices=(1, 2, 4, 8))
    parser.add_argument(
        "--suite", choices=("ranks", "host"), default="ranks", help="of one GPU: ranks that share it, or host memory"
    )
    parser.add_argument("--budget-s", type=float, default=200.0, help="no row starts that would not end within it")
    parser.add_argument(
        "--rows", nargs="+", metavar="TEXT", help="only rows of these names, or whose names hold a text that is no name"
    )
    parser.add_argument("--answer", type=int, metavar="N", help="answers of N tokens in every row, to shorten it")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs, in every row")
    parser.add_argument("--no-plan", action="store_true", help="do not compare KV tokens with sidp plan's")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args()
    if args.devices > 2:
        rows = node(args.devices, 141_000_000_000 if args.dry_run else device_memory())
    else:
        rows = two_gpus() if args.devices == 2 else host_tier() if args.suite == "host" else one_gpu()
    if args.rows:
        names = {row.name for row in rows}
        rows = [r for r in rows if any(text == r.name or (text not in names and text in r.name) for text in args.rows)]
    if args.answer:
        rows = [shortened(row, args.answer) for row in rows]
    if args.eager:
        rows = [replace(row, options=(*row.options, "--enforce-eager")) for row in rows]
    if args.dry_run:
        rows = [small(row) for row in rows]
    results: list[dict] = []
    report = {"environment": environment(args.dry_run), "rows": results}

    def keep() -> None:
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n")

    shared = not args.dry_run and args.devices == 1 and args.suite == "ranks"
    with tempfile.TemporaryDirectory(prefix="sidp-bench-") as scratch, mps(shared):
        bench = Bench(args, Path(scratch))
        for row in rows:
            results.append(bench.run(row))
            shown = ("name", "status", "output_tokens_per_s", "row_s", "load_s")
            print(json.dumps({key: results[-1].get(key) for key in shown}), flush=True)
            keep()  # before what takes longer, for a run that is cut short
            bench.predict(row, results[-1])
            keep()
    print_table(results)


if __name__ == "__main__":
    main()

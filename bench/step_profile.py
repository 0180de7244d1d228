"""Where the steps of `sidp run-batch` go on GPUs: its kernels, its fetches, and how fast the link is beside them.

    torchrun --nproc-per-node 2 bench/step_profile.py FOLDER -i in.jsonl -o out.jsonl --model Qwen3-32B --load-format dummy --mode was
    python bench/step_profile.py FOLDER                       # the report again

Each rank runs as `sidp run-batch` with the words behind FOLDER, and has torch's profiler look at STEPS steps with prompts and at as
many decode steps, after the first ones (AFTER), which writes FOLDER/prompts<N>.json.gz and decode<N>.json.gz (Chrome traces). Of
each the report says: a step's time, how much of it some kernel or some large copy runs, kernels by kind, and GB/s of the
copies while kernels run here and while none does.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

AFTER, STEPS = {"prompts": 20, "decode": 60}, 5
_LARGE = 1 << 24  # bytes; a fetch
_KINDS = (  # the first whose text is in a kernel's name
    ("serving CaS", "serve_"), ("asking by CaS", "sidp::cas"), ("ring", "sidp::cache"), ("attention", "flash"), ("attention", "_attend"), ("attention", "_join_kernel"), ("products", "nvjet"),
    ("products", "gemm"), ("products", "splitK"), ("sums", "reduce_kernel"), ("elementwise", "elementwise"),
)  # fmt: skip


def watch_steps(folder: Path) -> None:
    """From here on this rank's engine is profiled in `STEPS` steps of each kind. CUDA is not begun: run-batch has settings for it."""
    from sidp.batch import decode

    take_tokens = decode.DecodeSteps._tokens
    waiting = {"prompts": ("prompt_steps",), "decode": ("replayed_steps", "launched_steps")}
    looking: dict = {}

    def tokens(self):
        taken = take_tokens(self)
        if looking:
            kind = looking["kind"]
            if sum(self.times[name] for name in looking["names"]) >= looking["until"]:
                _end(looking.pop("profiler"), folder / f"{kind}{os.environ['RANK']}.json.gz")
                looking.clear()
        else:
            for kind, names in waiting.items():
                steps = sum(self.times[name] for name in names)
                if steps >= AFTER[kind]:
                    del waiting[kind]
                    looking.update(profiler=_begin(), kind=kind, names=names, until=steps + STEPS)
                    break
        return taken

    decode.DecodeSteps._tokens = tokens


def _begin():
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    profiler.__enter__()
    return profiler


def _end(profiler, path: Path) -> None:
    profiler.__exit__(None, None, None)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


def covered(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time in spans that do not touch, ascending."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def shared(a: tuple[float, float], spans: list[tuple[float, float]]) -> float:
    """How much of `a` lies in `spans`."""
    return sum(max(0.0, min(a[1], end) - max(a[0], begin)) for begin, end in spans)


def rates(copies: list[dict], kernels: list[tuple[float, float]]) -> tuple[float, float]:
    """GB/s of copies while no kernel runs here and while one does: the two that fit all copies' times best."""
    import numpy

    busy = numpy.array([shared((c["ts"], c["ts"] + c["dur"]), kernels) for c in copies])
    took = numpy.array([c["dur"] for c in copies])
    nbytes = numpy.array([c["args"]["bytes"] for c in copies], dtype=float)
    (idle_rate, busy_rate), *_ = numpy.linalg.lstsq(numpy.stack([took - busy, busy], axis=1), nbytes, rcond=None)
    return idle_rate / 1e3, busy_rate / 1e3


def kind_of(name: str) -> str:
    return next((kind for kind, text in _KINDS if text in name), "other")


def report(path: Path) -> None:
    """Prints a rank's figures, in ms of a step."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    work = [e for e in events if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not work:
        print(f"{path.name}: nothing ran on a GPU")
        return
    kernels = [e for e in work if e["cat"] == "kernel"]
    copies = [e for e in work if e["cat"] == "gpu_memcpy" and e["args"].get("bytes", 0) >= _LARGE]
    # The profiler's begin holds the host up: a step is taken from attention to attention, of which every layer has as many.
    marks = sorted(e["ts"] for e in kernels if kind_of(e["name"]) == "attention")
    if len(marks) < 2:
        print(f"{path.name}: no attention in it")
        return
    step_ms = 1e-3 * (marks[-1] - marks[0]) / (len(marks) - 1) * len(marks) / STEPS
    running = covered([(e["ts"], e["ts"] + e["dur"]) for e in kernels])
    by_kind: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        by_kind[kind_of(event["name"])].append(event["dur"])
    ms = 1e-3 / STEPS
    print(f"{path.name}: a step {step_ms:.1f} ms, some kernel runs in {sum(b - a for a, b in running) * ms:.1f}")
    for kind, times in sorted(by_kind.items(), key=lambda item: -sum(item[1])):
        print(f"  {kind:<14} {sum(times) * ms:6.1f} ms in {len(times) / STEPS:6.0f} kernels")
    if copies:
        copying = covered([(e["ts"], e["ts"] + e["dur"]) for e in copies])
        nbytes = sum(e["args"]["bytes"] for e in copies)
        print(f"  {'fetches':<14} {sum(b - a for a, b in copying) * ms:6.1f} ms, {nbytes / STEPS / 1e9:.1f} GB at "
              f"{nbytes / sum(e['dur'] for e in copies) / 1e3:.0f} GB/s: %.0f while no kernel runs here, %.0f beside kernels"
              % rates(copies, running))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("words", nargs=argparse.REMAINDER, help="of sidp run-batch; the number of ranks is torchrun's")
    args = parser.parse_args()
    status = 0
    if args.words:
        if "RANK" not in os.environ:
            parser.error("words for sidp run-batch, but no ranks: start this under torchrun")
        watch_steps(args.folder)
        from sidp.cli import main as command

        status = command(["run-batch", *args.words])
        if os.environ["RANK"] != "0":
            return status
    traces = sorted(args.folder.glob("*.json.gz"))
    for path in traces:
        report(path)
    if not traces:
        print(
            f"no traces in {args.folder}: it needs an engine that keeps decode steps apart, and more than {AFTER} steps",
            file=sys.stderr,
        )
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())

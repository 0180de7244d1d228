"""Draw which mode run-batch's ranks took as time went: python bench/plot_timeline.py FILE.json [MORE.json ...] OUT.png

FILE.json: results of bench/run_batch_gpu.py, or a summary of `sidp run-batch --summary`. A panel a run: requests at once, and between
two samples the share of FFN calls that were local, WaS and CaS. All panels have the same axis of time, seconds since the first token.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

_COLOURS = {"local": "#999999", "was": "#E69F00", "cas": "#009E73"}  # Okabe-Ito
_NAMES = {"local": "local", "was": "WaS", "cas": "CaS"}


def timelines(paths: list[str]) -> dict[str, list[dict[str, float]]]:
    """Samples by run, whose name says its output tokens/s, from the last one without a token to the first one with all."""
    found = {}
    for path in paths:
        told = json.loads(Path(path).read_text())
        for row in told.get("rows", [told]):
            if "timeline" not in row:
                continue
            columns = row["timeline"]["columns"]
            samples = [dict(zip(columns, values, strict=True)) for values in row["timeline"]["rows"]]
            first = next((n for n, sample in enumerate(samples) if sample["output_tokens"]), len(samples))
            last = next(
                n for n, sample in enumerate(samples) if sample["output_tokens"] == samples[-1]["output_tokens"]
            )
            name = f"{row.get('name') or Path(path).stem}: {row['output_tokens_per_s']:,.0f} output tokens/s"
            found[name] = samples[max(0, first - 1) : last + 1]
    return {name: samples for name, samples in found.items() if len(samples) > 1}


def shares(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Parts of the FFN calls between two samples."""
    calls = {mode: after[f"calls_{mode}"] - before[f"calls_{mode}"] for mode in _COLOURS}
    total = sum(calls.values())
    return {mode: count / total if total else 0.0 for mode, count in calls.items()}


def draw(runs: dict[str, list[dict[str, float]]], target: str) -> None:
    import matplotlib

    matplotlib.use("Agg")  # a file, never a window
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(runs), 1, figsize=(10, 2.2 * len(runs) + 0.8), layout="constrained", sharex=True, squeeze=False
    )
    for panel, (name, samples) in zip(panels[:, 0], runs.items(), strict=True):
        begin = samples[0]["seconds"]
        times = [sample["seconds"] - begin for sample in samples]
        parts = [shares(a, b) for a, b in pairwise(samples)]
        bands = [[part[mode] for part in parts] + [parts[-1][mode]] for mode in _COLOURS]
        panel.stackplot(times, bands, colors=_COLOURS.values(), labels=_NAMES.values(), step="post", alpha=0.6)
        panel.set_ylim(0, 1)
        panel.set_ylabel("share of FFN calls", fontsize=8)
        batch = panel.twinx()
        batch.plot(
            times, [sample["running"] for sample in samples], color="black", linewidth=1.2, label="requests at once"
        )
        batch.set_ylim(bottom=0)
        batch.set_ylabel("requests at once", fontsize=8)
        panel.set_title(name, loc="left", fontsize=10)
    panels[-1, 0].set_xlabel("seconds")
    handles, names = panels[0, 0].get_legend_handles_labels()
    line, of_line = batch.get_legend_handles_labels()
    figure.legend(handles + line, names + of_line, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(target, dpi=130)
    pyplot.close(figure)


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    runs = timelines(sys.argv[1:-1])
    if not runs:
        sys.exit("nothing to draw: no run there has a timeline with tokens in it")
    draw(runs, sys.argv[-1])


if __name__ == "__main__":
    main()

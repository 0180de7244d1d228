"""Draw what bench/run_batch_gpu.py measured: python bench/plot_run_batch.py RESULTS.json [MORE.json ...] OUT.png

One group of bars a pair of rows: KV tokens, peak batch, output tokens/s, each against the first row of its pair where that
one ran, and the tail in seconds. Rows without figures in any file are named below.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

# Okabe-Ito: told apart by colour-blind readers and in grey.
_COLOURS = ("#999999", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_PANELS = (
    ("kv_tokens", "KV tokens", 1e3, "thousand"),
    ("peak_batch", "requests at once", 1, ""),
    ("output_tokens_per_s", "output tokens/s", 1, ""),
    ("tail_s", "tail, s (under 5 % of the requests left)", 1, ""),
)


def load(paths: list[str]) -> tuple[str, list[dict]]:
    """Where and when it was measured, and all rows."""
    reports = [json.loads(Path(path).read_text()) for path in paths]
    names = dict.fromkeys(name for report in reports for name in report["environment"]["devices"])
    dates = sorted({report["environment"]["date"] for report in reports})
    return f"{', '.join(names)}, {' and '.join(dates)}", [row for report in reports for row in report["rows"]]


def by_pair(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows with figures, in the order in which they ran."""
    pairs: dict[str, list[dict]] = {}
    for row in rows:
        if row["status"] == "ok" and "identity" not in row["pair"]:
            pairs.setdefault(row["pair"], []).append(row)
    return pairs


def label(row: dict) -> str:
    """A row's name without its pair's, which stands below the group."""
    words = row["name"].split()
    return " ".join(word for word in words if word not in row["pair"].split()) or row["name"]


def draw(measured: str, rows: list[dict], target: str) -> None:
    import matplotlib

    matplotlib.use("Agg")  # a file, never a window
    from matplotlib import pyplot

    pairs = by_pair(rows)
    if not pairs:
        sys.exit("nothing to draw: no row has figures")
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    colours: dict[str, str] = {}
    for panel, (key, title, unit, word) in zip(panels.flat, _PANELS, strict=True):
        _bars(panel, pairs, key, unit, colours)
        panel.set_title(f"{title}{f', {word}' if word else ''}", loc="left", fontsize=10)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    drawn = {row["name"] for row in rows if row["status"] == "ok"}
    without = "; ".join(f"{row['name']}: {row['status'].split(':')[0]}" for row in rows if row["name"] not in drawn)
    figure.legend(
        handles, colours, loc="outside lower center", ncols=len(colours), frameon=False, fontsize=9,
        title=without or None, title_fontsize=7,
    )  # fmt: skip
    figure.suptitle(f"sidp run-batch, {measured}", x=0.01, ha="left", fontsize=11)
    figure.savefig(target, dpi=130)
    pyplot.close(figure)


def _bars(panel, pairs: dict[str, list[dict]], key: str, unit: float, colours: dict[str, str]) -> None:
    ticks = []
    at = 0.0
    for pair, rows in pairs.items():
        ticks.append((at + (len(rows) - 1) / 2, pair))
        for row in rows:
            name = label(row)
            colour = colours.setdefault(name, _COLOURS[len(colours) % len(_COLOURS)])
            panel.bar(at, row[key] / unit, color=colour, width=0.9)
            ratio = row[key] / rows[0][key] if rows[0][key] else 0.0
            text = f"{row[key] / unit:,.4g}" if row is rows[0] or not ratio else f"{ratio:.2f}x"
            if key == "tail_s":
                text = f"{row[key]:.1f}"
            panel.text(at, row[key] / unit, text, ha="center", va="bottom", fontsize=8)
            at += 1
        at += 0.7
    panel.set_xticks([x for x, _ in ticks], [name for _, name in ticks], fontsize=8)
    panel.margins(y=0.14)
    panel.grid(axis="y", alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    draw(*load(sys.argv[1:-1]), sys.argv[-1])

"""Draw what bench/group_gpu.py measured: python bench/plot_group.py GROUP.json OUT.png

Crowding at owners, the ladder of the tail beside the paper's, and a remote FFN by CaS over the local one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

_GREY, _BLUE, _ORANGE, _GREEN, _PINK = "#999999", "#0072B2", "#E69F00", "#009E73", "#CC79A7"  # Okabe-Ito
_PAPER_LADDER = (33.0, 25.0, 19.0, 12.0)  # seconds, one request


def draw(report: dict, target: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    for panel, fill in zip(panels, (_crowds, _ladder, _remote), strict=True):
        fill(panel, report["rows"])
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.25)
    asked = report["arguments"]
    figure.suptitle(
        f"{asked['ranks']} ranks, {report['device']}, FFNs of {asked['shape']}", x=0.01, ha="left", fontsize=11
    )
    figure.savefig(target, dpi=130)
    pyplot.close(figure)


def _crowds(panel, rows: list[dict]) -> None:
    cases: dict[tuple, dict[tuple[str, int], float]] = {}
    for row in rows:
        if row["part"] == "incast" and "step" in row:
            bars = cases.setdefault((row["placement"], row["slots"], row["step"]), {})
            bars |= {(order, row["turns"]): row[order] for order in ("shifted", "plain", "took") if order in row}
    at, ticks = 0.0, []
    for (placement, slots, step), bars in cases.items():
        for n, ((order, turns), took) in enumerate(bars.items()):
            hatch = "//" if order == "plain" else None
            panel.bar(at + n, took, color=_GREEN if turns else _GREY, width=0.9, hatch=hatch, edgecolor="white")
        ticks.append((at + (len(bars) - 1) / 2, f"{placement}, {slots}\n{step}"))
        at += len(bars) + 0.6
    panel.set_xticks([x for x, _ in ticks], [text for _, text in ticks], fontsize=6.5, rotation=60)
    panel.set_title("WaS bound by the link, ms (placement, slots, in step at)", loc="left", fontsize=9)
    for name, style in (
        ("owners as they are asked", {"color": _GREY}),
        ("owners in turns", {"color": _GREEN}),
        ("plain order", {"color": "white", "hatch": "//", "edgecolor": _GREY}),
    ):
        panel.bar(0, 0, label=name, **style)
    panel.set_ylim(top=1.3 * panel.get_ylim()[1])  # room for the legend
    panel.legend(frameon=False, fontsize=8)


def _ladder(panel, rows: list[dict]) -> None:
    gain = next(row["gain"] for row in rows if row["part"] == "tail")
    paper = [_PAPER_LADDER[0] / seconds for seconds in _PAPER_LADDER]
    names = ["paper: all-gather", "P2P", "fused", "no dummies", *gain]
    values = [*paper, *gain.values()]
    colours = [_GREY] * len(paper) + [_BLUE] * (len(gain) - 1) + [_GREEN]
    panel.bar(range(len(values)), values, color=colours)
    for x, value in enumerate(values):
        panel.text(x, value, f"{value:.1f}x", ha="center", va="bottom", fontsize=8)
    panel.set_yscale("log")
    panel.set_xticks(range(len(values)), names, fontsize=7, rotation=60)
    panel.set_title("One row in the tail: times as fast as gathering", loc="left", fontsize=9)


def _remote(panel, rows: list[dict]) -> None:
    for placement, colour in (("layer", _ORANGE), ("striped", _GREEN)):
        mine = [row for row in rows if row["part"] == "cas" and row["placement"] == placement and "rows" in row]
        for key, style, who in (("one_over_cublas", "o-", "one rank asks"), ("all_over_cublas", "s--", "all ask")):
            panel.plot(
                [row["rows"] for row in mine],
                [row[key] for row in mine],
                style,
                color=colour,
                label=f"{placement}, {who}",
            )
    panel.axhline(1.0, color=_GREY, linewidth=1)
    panel.set_xscale("log", base=2)
    panel.set_ylim(bottom=0)
    panel.set_title("A remote FFN by CaS over the local one by cuBLAS, by rows", loc="left", fontsize=9)
    panel.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])

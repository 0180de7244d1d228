"""The plots of docs/simulate.md, docs/simulate_paper.md and docs/planning.md: small PNG files of one subject each."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from . import paper

_COLOURS = (
    "#56606B",
    "#0072B2",
    "#56B4E9",
    "#D55E00",
    "#009E73",
    "#CC79A7",
)  # Okabe-Ito: told apart by colour-blind readers


def draw(folder: str, name: str, plot: str, of) -> None:
    """Writes `name` into `folder`: the plot of PLOTS that is named `plot`. Raises ConfigError where it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")  # files, never windows
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    try:
        PLOTS[plot](axes, of)
        axes.grid(alpha=0.25)
        figure.savefig(Path(folder) / name, dpi=100)
    except OSError as error:
        raise ConfigError(f"cannot write {name} into {folder}: {error}; give a folder that exists") from error
    finally:
        pyplot.close(figure)


def _line(axes, xs, ys, label, colour, style="o-") -> None:
    axes.plot(list(xs), list(ys), style, markersize=3, color=colour, label=label)


def _bars(axes, names, groups: dict) -> None:
    """Beside each other, by name; `groups`: label -> values."""
    width = 0.8 / len(groups)
    for number, (colour, (label, values)) in enumerate(zip(_COLOURS, groups.items(), strict=False)):
        at = [i + (number - (len(groups) - 1) / 2) * width for i in range(len(values))]
        axes.bar(at, values, width, color=colour, label=label)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.margins(y=0.1 + 0.12 * len(groups))  # room for the legend above the bars
    axes.legend(fontsize=8, loc="upper left")


def _capacity(axes, figures) -> None:
    names = [f.what.split("replicas, ")[-1].split("tokens, ")[-1].replace(", ", "\n") for f in figures]
    _bars(axes, names, {"paper": [f.low for f in figures], "planned": [f.simulated for f in figures]})
    axes.set_ylabel("gain over replicas | M tokens")


def _fetch(axes, rows) -> None:
    for colour, (name, fetch, points) in zip(_COLOURS, rows, strict=False):
        _line(axes, [n for n, _ in points], [s / fetch for _, s in points], name, colour)
    axes.axhline(1, color="k", linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("requests decoding on a rank")
    axes.set_ylabel("T(B) / fetch")
    axes.legend(fontsize=7)


def _throughput(axes, results) -> None:
    axes.axvspan(3900, 4300, 0, 1, color="#DDDDDD")
    axes.plot([4096, 4096], [1.3, 1.5], color="k", linewidth=4, label="paper, 4K")
    axes.plot([1024], [1], "k*", label="paper, 1K")
    styles = {"Llama-3.1-70B": "o-", "Qwen2.5-72B": "s--", "Qwen3-32B": "^:"}
    for colour, gpu in zip(_COLOURS[1:], dict.fromkeys(t.gpu for t in results), strict=False):
        for model, style in styles.items():
            mine = [t for t in results if (t.gpu, t.model) == (gpu, model)]
            _line(axes, [t.seq for t in mine], [t.gain("turns") for t in mine], f"{model}, {gpu}", colour, style)
    axes.set_xlabel("tokens of a request")
    axes.set_ylabel("best pool / best without\n(owners in turns)")
    axes.legend(fontsize=6, ncols=2)


_SHOWN = ("as assumed", "no jitter", "plain order with 1 slot, in step at every layer, owners in turns")


def _shifting(axes, effects) -> None:
    chosen = {e.cause: [f.simulated for f in e.figures] for e in effects if e.cause in _SHOWN or e.reproduces}
    _bars(axes, [f.what for f in effects[0].figures], {"paper": [f.low for f in effects[0].figures], **chosen})
    axes.set_ylabel("plain order / shifted")


def _ladder(axes, seconds) -> None:
    ways = {way: list(of.values()) for way, of in seconds.items()}
    _bars(axes, list(paper.LADDER), {"paper": list(paper.LADDER.values()), **ways})
    axes.set_ylabel("seconds")


def _modes(axes, outcome) -> None:
    mine = [i for i in outcome.native.iterations if i.rank == 0]
    for mode, label, colour in ((1, "WaS", _COLOURS[1]), (2, "CaS", _COLOURS[3])):
        chosen = [i for i in mine if i.mode == mode]
        _line(axes, [i.begin for i in chosen], [i.requests for i in chosen], label, colour, ".")
    axes.set_xlabel("seconds")
    axes.set_ylabel("requests running on rank 0")
    axes.legend()


def _placements(axes, placed) -> None:
    for colour, name in zip(_COLOURS, dict.fromkeys(name for name, _ in placed), strict=False):
        points = [p for n, p in placed if n == name]
        _line(axes, [p.rows for p in points], [p.iteration_s * 1e3 for p in points], name, colour)
    axes.plot([p.rows for p in points], [p.local_s * 1e3 for p in points], "k--", linewidth=1, label="all weights here")
    axes.set_xlabel("requests decoding on a rank")
    axes.set_ylabel("ms an iteration")
    axes.legend(fontsize=8)


def _rings(axes, rings) -> None:
    ways = (("layer", False), ("striped", False), ("layer", True), ("striped", True))
    for colour, (placement, turns) in zip(_COLOURS[1:], ways, strict=False):
        points = [p for p in rings if (p.setup.placement, p.setup.fabric.turns) == (placement, turns)]
        label = f"{placement}, owners {'take turns' if turns else 'fair'}"
        _line(axes, [p.setup.slots for p in points], [p.iteration_s / p.local_s for p in points], label, colour)
    axes.set_xlabel("slots of the ring")
    axes.set_ylabel("iteration / all weights here")
    axes.legend(fontsize=8)


def _sizes(axes, sizes) -> None:
    ranks = [d for d, _, _ in sizes]
    _line(axes, ranks, [p.iteration_s / p.local_s for _, p, _ in sizes], "iteration / all weights here", _COLOURS[3])
    last = max(kv for _, _, kv in sizes)
    _line(axes, ranks, [kv / last for _, _, kv in sizes], f"KV tokens of a rank / {last:,}", _COLOURS[1])
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(d) for d in ranks])
    axes.set_xlabel("ranks of the pool")
    axes.legend(fontsize=8)


def _links(axes, crossings) -> None:
    chosen = [c for c in crossings if c.turns]
    groups = {"WaS no slower than CaS": "was_rows", "fetches hidden": "hidden_rows"}
    names = [f"{c.gpu}\n{c.link}" for c in chosen]
    _bars(axes, names, {label: [getattr(c, field) or 0 for c in chosen] for label, field in groups.items()})
    axes.set_yscale("log", base=2)
    axes.set_ylim(32, 2**15)
    axes.set_ylabel("rows on each rank (no bar: none)")


PLOTS = {
    "capacity": _capacity, "fetch": _fetch, "throughput": _throughput, "shifting": _shifting, "ladder": _ladder,
    "modes": _modes, "placements": _placements, "rings": _rings, "sizes": _sizes, "links": _links,
}  # fmt: skip

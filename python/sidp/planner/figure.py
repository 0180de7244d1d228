"""A picture of a plan: where a GPU's bytes go, and from how many rows on the fetches are hidden."""

from __future__ import annotations

from ..errors import ConfigError
from .advice import Plan

# Okabe-Ito: told apart by colour-blind readers and in grey.
_PARTS = (
    ("weights without FFN", "#56606B"),
    ("FFN weights", "#0072B2"),
    ("ring", "#56B4E9"),
    ("activations, reserve", "#CCCCCC"),
    ("KV cache", "#009E73"),
)


def plot_plan(plan: Plan, path: str) -> None:
    """Draws into the file `path`. Raises ConfigError where it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")  # a file, never a window
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    _draw_memory(left, plan)
    _draw_times(right, plan)
    d = plan.deployment
    figure.suptitle(f"{d.model.name} on {d.dp * d.tp} x {d.gpu.name}, TP={d.tp}, DP={d.dp}", x=0.01, ha="left")
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write {path}: {error}; choose another file") from error
    finally:
        pyplot.close(figure)


def _draw_memory(axes, plan: Plan) -> None:
    names = [f"{option.name}\n{option.memory.node_kv_tokens / 1e6:.2f} M tokens" for option in plan.options]
    bottom = [0.0] * len(names)
    for part, (label, colour) in enumerate(_PARTS):
        heights = [_parts(option.memory)[part] / 1e9 for option in plan.options]
        axes.bar(names, heights, bottom=bottom, color=colour, label=label, width=0.6)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    usable = plan.replicated.memory.usable_bytes / 1e9
    axes.axhline(usable, color="#D55E00", linewidth=1.2, label=f"usable, {usable:.0f} GB")
    axes.set_ylabel("GB of one GPU")
    axes.set_ylim(0, 1.45 * max(bottom))
    axes.legend(loc="upper left", fontsize=8, ncols=2)


def _parts(memory) -> tuple[int, ...]:
    rank = memory.tightest
    fixed = (memory.other_bytes, memory.ffn_bytes[rank], memory.ring_bytes[rank])
    return (*fixed, memory.activation_bytes + memory.reserve_bytes, max(0, memory.kv_bytes(rank)))


def _draw_times(axes, plan: Plan) -> None:
    option = next((option for option in plan.pooled if option.memory.active), None)
    if option is None:
        axes.set_axis_off()
        axes.text(0.5, 0.5, f"no pool: {plan.pooled[0].memory.reason}", ha="center", wrap=True)
        return
    clock, hidden, shared = option.clock, option.clock.hidden_rows(), option.clock.was_rows()
    last = 2 * max(hidden or 1, option.memory.batch, 64)
    rows = sorted({max(1, round(last ** (step / 80))) for step in range(81)})
    times = [clock.at(n) for n in rows]
    for label, colour, style, values in (
        ("compute T(B)", "#E69F00", "-", [t.compute for t in times]),
        ("fetch", "#0072B2", "--", [t.fetch for t in times]),
        ("CaS iteration", "#CC79A7", ":", [t.cas for t in times]),
    ):
        axes.plot(rows, [1e3 * value for value in values], style, color=colour, label=label)
    for at, label in ((shared, "WaS beats CaS"), (hidden, "fetches hidden"), (option.memory.batch, "full batch")):
        if at:
            axes.axvline(at, color="#888888", linewidth=0.8)
            axes.text(at, axes.get_ylim()[1], f" {label}: {at:,}", rotation=90, va="top", ha="right", fontsize=7)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xlabel("requests decoding on a replica")
    axes.set_ylabel("ms an iteration")
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.25)

"""A picture of a rank over time: fetches and compute by layer, and which layer each slot holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import ConfigError

# (kind, layer, slot, start, end): kind "fetch", "compute" or "stall"; slot -1 for a local layer; seconds.
TraceEvent = tuple[str, int, int, float, float]

# Okabe-Ito: told apart by colour-blind readers and in grey.
_COLOURS = {"fetch": "#0072B2", "compute": "#E69F00", "stall": "#D55E00", "ready": "#BFD8E8"}


@dataclass(frozen=True)
class Stay:
    """A unit's life in a slot: fetched from `fetch` to `ready`, read from `use` to `end`; seconds."""

    slot: int
    layer: int
    fetch: float
    ready: float
    use: float
    end: float


def forwards(trace: Sequence[TraceEvent]) -> list[tuple[float, float]]:
    """Start and end of each forward: a new one begins where the layer number falls. Seconds."""
    uses = sorted((start, end, layer) for kind, layer, _, start, end in trace if kind == "compute")
    spans: list[tuple[float, float]] = []
    last_layer = None
    for start, end, layer in uses:
        if last_layer is None or layer <= last_layer:
            spans.append((start, end))
        else:
            spans[-1] = (spans[-1][0], end)
        last_layer = layer
    return spans


def stays(trace: Sequence[TraceEvent]) -> list[Stay]:
    """Join each fetch with the compute that read it; a fetch nobody used yet ends with itself."""
    found = []
    uses: dict[tuple[int, int], list[tuple[float, float]]] = {}
    fetches = sorted((event for event in trace if event[0] == "fetch"), key=lambda event: event[3])
    for kind, layer, slot, start, end in sorted(trace, key=lambda event: event[3]):
        if kind == "compute" and slot >= 0:
            uses.setdefault((slot, layer), []).append((start, end))
    for index, (_, layer, slot, start, end) in enumerate(fetches):
        later = (event[3] for event in fetches[index + 1 :] if event[2] == slot)
        replaced = next(later, float("inf"))
        mine = [use for use in uses.get((slot, layer), []) if end <= use[1] and use[0] < replaced]
        found.append(Stay(slot, layer, start, end, mine[0][0] if mine else end, mine[-1][1] if mine else end))
    return found


def steady_window(trace: Sequence[TraceEvent], count: int = 2) -> tuple[float, float]:
    """The span of `count` forwards from the middle of the trace, where the ring runs steadily. Seconds."""
    spans = forwards(trace)
    if not spans:
        return (0.0, max((event[4] for event in trace), default=1.0))
    first = max(0, min(len(spans) // 2, len(spans) - count))
    last = min(len(spans), first + count) - 1
    margin = 0.03 * (spans[last][1] - spans[first][0])
    return (spans[first][0] - margin, spans[last][1] + margin)


def plot_timeline(
    trace: Sequence[TraceEvent], path: str, title: str = "", window: tuple[float, float] | None = None
) -> None:
    """Draw `trace` (as `pool.trace()` gives it) into the file `path`.

    `window` is the span to show in the trace's seconds; by default two forwards from the middle. Raises
    ConfigError where there is nothing to draw or the file cannot be written.
    """
    if not trace:
        raise ConfigError(
            f"nothing to draw into {path}: the trace is empty; call pool.start_trace() before the "
            "forwards, on a pool with remote layers"
        )
    import matplotlib

    matplotlib.use("Agg")  # a file, never a window
    from matplotlib import pyplot

    begin, end = window or steady_window(trace)
    shown = [event for event in trace if event[4] > begin and event[3] < end]
    held = [stay for stay in stays(trace) if stay.end > begin and stay.fetch < end]
    slots = max([stay.slot for stay in held], default=0) + 1
    layers = max(event[1] for event in trace) + 1
    figure, (top, bottom) = pyplot.subplots(
        2,
        1,
        sharex=True,
        figsize=(11, 6.5),
        layout="constrained",
        gridspec_kw={"height_ratios": [3.2, max(0.8, min(2.0, 0.35 * slots))]},
    )
    _draw_layers(top, shown, layers, begin)
    _draw_ring(bottom, held, slots, begin)
    bottom.set_xlim(0, (end - begin) * 1e3)
    bottom.set_xlabel("time, ms")
    top.set_title(title, loc="left")
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; choose another file") from error
    finally:
        pyplot.close(figure)


def _draw_layers(axes, shown: Sequence[TraceEvent], layers: int, begin: float) -> None:
    from matplotlib.patches import Patch

    handles = []
    for kind, label in (("fetch", "fetch from the owner"), ("compute", "FFN compute"), ("stall", "stall")):
        bars = [event for event in shown if event[0] == kind]
        axes.barh(
            [event[1] for event in bars],
            [(event[4] - event[3]) * 1e3 for event in bars],
            left=[(event[3] - begin) * 1e3 for event in bars],
            height=0.8,
            color=_COLOURS[kind],
        )
        handles.append(Patch(color=_COLOURS[kind], label=f"{label} ({len(bars)})"))
    axes.set_ylim(layers - 0.4, -0.6)  # layer 0 on top, as a forward runs
    axes.set_ylabel("layer")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="x", alpha=0.25)
    axes.legend(handles=handles, loc="upper right", fontsize=9, framealpha=0.9)


def _draw_ring(axes, held: Sequence[Stay], slots: int, begin: float) -> None:
    def bars(name, label, spans):
        axes.barh(
            [stay.slot for stay, *_ in spans],
            [(end - start) * 1e3 for _, start, end in spans],
            left=[(start - begin) * 1e3 for _, start, _ in spans],
            height=0.8,
            color=_COLOURS[name],
            label=label,
        )

    bars("fetch", "fetching", [(stay, stay.fetch, stay.ready) for stay in held])
    bars("ready", "ready", [(stay, stay.ready, stay.use) for stay in held])
    bars("compute", "in use", [(stay, stay.use, stay.end) for stay in held])
    if len(held) <= 120:
        for stay in held:
            middle = (stay.fetch + stay.end) / 2 - begin
            axes.text(middle * 1e3, stay.slot, str(stay.layer), ha="center", va="center", fontsize=7, clip_on=True)
    axes.set_ylim(slots - 0.4, -0.6)
    axes.set_yticks(range(slots))
    axes.set_ylabel("ring slot\n(layer inside)")
    axes.grid(axis="x", alpha=0.25)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=8, ncols=3, frameon=False)

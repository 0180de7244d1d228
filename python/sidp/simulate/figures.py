"""The plots of docs/simulate.md: small PNG files of one subject each."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError

_COLOURS = ("#56606B", "#0072B2", "#56B4E9", "#D55E00", "#009E73")  # Okabe-Ito: told apart by colour-blind readers


def plot_all(folder: str, switched, placed, rings) -> None:
    """Writes sim_modes.png, sim_placements.png and sim_rings.png. Raises ConfigError where `folder` cannot be written."""
    import matplotlib

    matplotlib.use("Agg")  # files, never windows
    from matplotlib import pyplot

    def draw(name: str, paint) -> None:
        figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
        try:
            paint(axes)
            axes.grid(alpha=0.25)
            figure.savefig(Path(folder) / name, dpi=100)
        except OSError as error:
            raise ConfigError(f"cannot write {name} into {folder}: {error}; give a folder that exists") from error
        finally:
            pyplot.close(figure)

    draw("sim_modes.png", lambda axes: _modes(axes, switched["auto"]))
    draw("sim_placements.png", lambda axes: _placements(axes, placed))
    draw("sim_rings.png", lambda axes: _rings(axes, rings))


def _modes(axes, outcome) -> None:
    mine = [i for i in outcome.native.iterations if i.rank == 0]
    for mode, label, colour in ((1, "WaS", _COLOURS[1]), (2, "CaS", _COLOURS[3])):
        chosen = [i for i in mine if i.mode == mode]
        axes.plot([i.begin for i in chosen], [i.requests for i in chosen], ".", markersize=3, color=colour, label=label)
    axes.set_xlabel("seconds")
    axes.set_ylabel("requests running on rank 0")
    axes.legend()


def _placements(axes, placed) -> None:
    for colour, name in zip(_COLOURS, dict.fromkeys(name for name, _ in placed), strict=True):
        points = [p for n, p in placed if n == name]
        axes.plot(
            [p.rows for p in points],
            [p.iteration_s * 1e3 for p in points],
            "o-",
            markersize=3,
            color=colour,
            label=name,
        )
    axes.plot([p.rows for p in points], [p.local_s * 1e3 for p in points], "k--", linewidth=1, label="all weights here")
    axes.set_xlabel("requests decoding on a rank")
    axes.set_ylabel("ms an iteration")
    axes.legend(fontsize=8)


def _rings(axes, rings) -> None:
    for colour, (placement, turns) in zip(
        _COLOURS[1:], (("layer", False), ("striped", False), ("layer", True), ("striped", True)), strict=True
    ):
        points = [p for p in rings if (p.setup.placement, p.setup.fabric.turns) == (placement, turns)]
        label = f"{placement}, owners {'take turns' if turns else 'fair'}"
        axes.plot(
            [p.setup.slots for p in points],
            [p.iteration_s / p.local_s for p in points],
            "o-",
            markersize=3,
            color=colour,
            label=label,
        )
    axes.set_xlabel("slots of the ring")
    axes.set_ylabel("iteration / all weights here")
    axes.legend(fontsize=8)

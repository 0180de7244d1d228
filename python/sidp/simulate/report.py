"""The paper's experiments and the studies as Markdown tables, and as plots where a folder is given."""

from __future__ import annotations

from . import paper, studies


def print_paper(folder: str | None = None) -> None:
    """Prints every table to standard output; takes minutes. Draws into `folder` if there is one."""
    figures = [*paper.capacity(), *paper.shifting()]
    _print_figures("Capacity and peak shifting", figures)
    switched = paper.switching()
    _print_switching(switched)
    _print_ladder()
    placed = list(studies.placements())
    _table(
        "Placements: iteration ms by rows", ("way", "rows", "local", "iteration", "crowded"), _placement_rows(placed)
    )
    rings = list(studies.rings())
    _table(
        "Rings: iteration over local",
        ("placement", "slots", "owners", "iteration / local"),
        ((p.setup.placement, p.setup.slots, _owners(p), f"{p.iteration_s / p.local_s:.2f}") for p in rings),
    )
    _table(
        "D ranks of one NVLink domain",
        ("D", "local ms", "iteration ms", "KV tokens a rank"),
        ((d, f"{p.local_s * 1e3:.0f}", f"{p.iteration_s * 1e3:.0f}", f"{kv:,}") for d, p, kv in studies.sizes()),
    )
    _table(
        "Links: fewest rows",
        ("GPU", "link", "WaS no slower than CaS", "fetches hidden within 5 %"),
        ((c.gpu, c.link, c.was_rows or "-", c.hidden_rows or "-") for c in studies.crossings()),
    )
    if folder is not None:
        from .figures import plot_all

        plot_all(folder, switched, placed, rings)
    _print_throughput(paper.throughput())


def _table(title: str, heads, rows) -> None:
    print(f"\n### {title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |", flush=True)


def _print_figures(title: str, figures) -> None:
    _table(
        title,
        ("what", "paper", "simulated", "ratio"),
        ((f.what, f"{f.low:g}{f.unit}", f"{f.simulated:.2f}{f.unit}", f"{f.ratio:.2f}") for f in figures),
    )
    for why in dict.fromkeys(f.why for f in figures if not f.agrees):
        print(f"\nMore than 15 % off: {why}.")


def _print_throughput(results) -> None:
    paper_gain = {1024: "near 1", 2048: "", 4096: "1.3-1.5"}
    _table(
        "Throughput of 8 GPUs",
        ("model", "GPU", "seq", "best without a pool", "tokens/s", "best pool", "tokens/s", "gain", "paper"),
        (
            (t.model, t.gpu, t.seq, paper.name_of(t.base.setup), f"{t.base.tokens_per_s:,.0f}", paper.name_of(t.pool.setup),
             f"{t.pool.tokens_per_s:,.0f}", f"{t.gain:.2f}", paper_gain[t.seq])
            for t in results
        ),
    )  # fmt: skip


def _print_switching(outcomes) -> None:
    base, stated = outcomes["replicas"], {"was": "1.07-1.09", "auto": "1.27-1.32"}
    _table(
        "WaS, CaS, switching",
        ("mode", "seconds", "against replicas", "paper"),
        ((n, f"{o.seconds:.0f}", f"{base.seconds / o.seconds:.2f}", stated.get(n, "")) for n, o in outcomes.items()),
    )


def _print_ladder() -> None:
    stated = {"gather": 33, "v1": 25, "v2": 19, "v3": 12}
    for dp, tp in ((4, 2), (8, 1)):
        steps = paper.ladder(dp=dp, tp=tp)
        last = steps["v3"].seconds
        _table(
            f"The tail ladder, H20, TP={tp}, DP={dp}",
            ("step", "paper s", "simulated s", "paper / v3", "simulated / v3", "ratio"),
            (
                (n, stated[n], f"{o.seconds:.1f}", f"{stated[n] / 12:.2f}", f"{o.seconds / last:.2f}",
                 f"{o.seconds / last / (stated[n] / 12):.2f}")
                for n, o in steps.items()
            ),
        )  # fmt: skip


def _placement_rows(placed):
    for name, p in placed:
        yield name, p.rows, f"{p.local_s * 1e3:.0f}", f"{p.iteration_s * 1e3:.0f}", f"{p.crowded:.2f}"


def _owners(point) -> str:
    return "in turns" if point.setup.fabric.turns else "fair"

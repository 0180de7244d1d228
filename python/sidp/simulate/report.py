"""The paper's experiments and the studies as Markdown tables, and as plots where a folder is given."""

from __future__ import annotations

from . import causes, paper, studies


def print_parts(parts=None, folder: str | None = None) -> None:
    """Prints the tables of `parts` (names of PARTS, None: all, some 20 minutes on one core). Draws their plots into `folder`."""
    for part in parts or PARTS:
        PARTS[part](folder)


def _capacity(folder) -> None:
    figures = list(paper.capacity())
    _table(
        "Capacity",
        ("what", "paper", "simulated", "ratio"),
        ((f.what, f"{f.low:g}{f.unit}", f"{f.simulated:.2f}{f.unit}", f"{f.ratio:.2f}") for f in figures),
    )
    _draw(folder, "sim_capacity.png", "capacity", figures)


def _fetch(folder) -> None:
    rows = list(studies.fetch_against_compute())
    _table(
        "Fetch time against T(B), ms",
        ("model and node", "fetch", *(f"T({n})" for n, _ in rows[0][2])),
        ((name, f"{fetch * 1e3:.0f}", *(f"{s * 1e3:.0f}" for _, s in points)) for name, fetch, points in rows),
    )
    _draw(folder, "sim_fetch.png", "fetch", rows)


def _throughput(folder) -> None:
    full = list(paper.throughput())
    _print_throughput("Answered tokens/s of 8 GPUs, memory at 0.9", full)
    _draw(folder, "sim_throughput.png", "throughput", full)
    _print_throughput("The same, memory capped at 0.6", list(paper.throughput(seqs=(1024, 4096), utilization=0.6)))


def _print_throughput(title: str, results) -> None:
    ways = ("TP8", "TP4 PP2", "TP2 PP4", "TP4 DP2 replicas", "TP2 DP4 replicas", "TP1 DP8 replicas")
    pools = ("TP2 DP4 layer", "TP1 DP8 layer")

    def cell(outcomes, way) -> str:
        return f"{outcomes[way].tokens_per_s:,.0f}" if way in outcomes else "-"

    def gain(value) -> str:
        return f"{value:.2f}" if value else "-"

    _table(
        title,
        ("model", "GPU", "seq", *ways, *(f"{p}, fair / turns" for p in pools), "gain, fair", "in turns", "over TP2 PP4", "over TP8"),
        (
            (t.model, t.gpu, t.seq, *(cell(t.replicas, w) for w in ways),
             *(f"{cell(t.pools, p)} / {cell(t.turns, p)}" for p in pools),
             gain(t.gain()), gain(t.gain("turns")), gain(t.gain("turns", "TP2 PP4")), gain(t.gain("turns", "TP8")))
            for t in results
        ),
    )  # fmt: skip


def _shifting(folder) -> None:
    effects = list(causes.shifting())
    _print_effects("Peak shifting, Qwen3-32B, H20: gain", effects)
    _draw(folder, "sim_shifting.png", "shifting", effects)


def _ladder(folder) -> None:
    _print_effects("The tail ladder, Llama-3.1-70B: each step over v3", list(causes.ladder()))
    ways = {
        "as assumed": {},
        "in step at every layer, 0.2 ms a layer": causes.LADDER["in step at every layer, 0.2 ms a layer"],
    }
    seconds = {way: {n: o.seconds for n, o in paper.ladder(**change).items()} for way, change in ways.items()}
    _table(
        "The same in seconds, 300 tokens, H20, TP=2, DP=4",
        ("step", "paper", *seconds),
        ((n, s, *(f"{of[n]:.1f}" for of in seconds.values())) for n, s in paper.LADDER.items()),
    )
    _draw(folder, "sim_ladder.png", "ladder", seconds)


def _causes(folder) -> None:
    _print_effects("Throughput, Llama-3.1-70B, TP=2, DP=4: gain over replicas", list(causes.throughput()))


def _switching(folder) -> None:
    stated = {"was": "1.07-1.09", "auto": "1.27-1.32"}
    for gpu in ("h20-141", "h200"):
        outcomes = paper.switching(gpu)
        base = outcomes["replicas"]
        _table(
            f"WaS, CaS, switching, {gpu}",
            ("mode", "seconds", "against replicas", "paper"),
            (
                (n, f"{o.seconds:.0f}", f"{base.seconds / o.seconds:.2f}", stated.get(n, ""))
                for n, o in outcomes.items()
            ),
        )
        if gpu == "h200":
            _draw(folder, "sim_modes.png", "modes", outcomes["auto"])


def _placements(folder) -> None:
    placed = list(studies.placements())
    _table(
        "Placements: iteration ms by rows", ("way", "rows", "local", "iteration", "crowded"), _placement_rows(placed)
    )
    _draw(folder, "sim_placements.png", "placements", placed)
    rings = list(studies.rings())
    _table(
        "Rings: iteration over local",
        ("placement", "slots", "owners", "iteration / local"),
        (
            (p.setup.placement, p.setup.slots, _owners(p.setup.fabric.turns), f"{p.iteration_s / p.local_s:.2f}")
            for p in rings
        ),
    )
    _draw(folder, "sim_rings.png", "rings", rings)


def _sizes(folder) -> None:
    sizes = list(studies.sizes())
    _table(
        "D ranks of one NVLink domain",
        ("D", "local ms", "iteration ms", "KV tokens a rank"),
        ((d, f"{p.local_s * 1e3:.0f}", f"{p.iteration_s * 1e3:.0f}", f"{kv:,}") for d, p, kv in sizes),
    )
    _draw(folder, "sim_sizes.png", "sizes", sizes)


def _links(folder) -> None:
    crossings = list(studies.crossings())
    _table(
        "Links: fewest rows on each of 8 ranks",
        ("GPU", "link", "owners", "fetch ms", "WaS no slower than CaS", "fetches hidden within 5 %"),
        (
            (c.gpu, c.link, _owners(c.turns), f"{c.fetch_s * 1e3:.0f}", c.was_rows or "none", c.hidden_rows or "none")
            for c in crossings
        ),
    )
    _draw(folder, "sim_links.png", "links", crossings)


def _choices(folder) -> None:
    def best(of) -> str:
        return f"{of[0]}: {of[1]:,.0f}" if of else "none fits"

    _table(
        "What to run: answered tokens/s",
        ("node", "model", "seq", "replicas", "pool", "pool, owners in turns"),
        ((c.node, c.model, c.seq, best(c.replicas), best(c.pool), best(c.turns)) for c in studies.choices()),
    )


PARTS = {
    "capacity": _capacity, "fetch": _fetch, "throughput": _throughput, "shifting": _shifting, "ladder": _ladder,
    "switching": _switching, "causes": _causes, "placements": _placements, "sizes": _sizes, "links": _links,
    "choices": _choices,
}  # fmt: skip


def _draw(folder: str | None, name: str, plot: str, of) -> None:
    if folder is not None:
        from .figures import draw

        draw(folder, name, plot, of)


def _table(title: str, heads, rows) -> None:
    print(f"\n### {title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |", flush=True)


def _print_effects(title: str, effects) -> None:
    """A cause a row: what is simulated, and in brackets its ratio to the paper."""
    heads = (f"{f.what} ({f.low:.3g}{f'-{f.high:.3g}' if f.high > f.low else ''})" for f in effects[0].figures)
    _table(
        title,
        ("cause switched on", *heads, "all within 15 %"),
        (
            (e.cause, *(f"{f.simulated:.2f} ({f.ratio:.2f})" for f in e.figures), "yes" if e.reproduces else "")
            for e in effects
        ),
    )


def _placement_rows(placed):
    for name, p in placed:
        yield name, p.rows, f"{p.local_s * 1e3:.0f}", f"{p.iteration_s * 1e3:.0f}", f"{p.crowded:.2f}"


def _owners(turns: bool) -> str:
    return "in turns" if turns else "fair"

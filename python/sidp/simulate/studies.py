"""What the simulator is for: which placement, how long a ring, how many ranks, how slow a link."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import workload
from .machine import Fabric, Rates
from .paper import name_of, node, requests_of, try_run
from .setup import Setup, run

# What one GPU's link brings in, GB/s: NVLink as attained, PCIe 5 as measured from pinned memory, 400 Gbit/s less 10 %.
LINKS = {"NVLink": None, "PCIe 5": 55.0, "400G": 45.0}
_ITERATIONS = 10


@dataclass(frozen=True)
class Point:
    """Steady decoding: what an iteration takes with all weights here, and in this setup; seconds."""

    setup: Setup
    rows: int
    local_s: float
    iteration_s: float
    crowded: float


def steady(setup: Setup, rows: int) -> Point:
    """`rows` requests on each rank; memory is taken as large enough."""
    iterations = max(3, _ITERATIONS if setup.deployment.dp <= 8 else 80 // setup.deployment.dp)
    requests = workload.decoding(setup.deployment.dp, rows, iterations, setup.deployment.context)
    setup = replace(setup, kv_tokens=10**9)
    local = Rates(setup.deployment, setup.memory(), setup.engine).iteration(rows)
    outcome = run(setup, requests)
    return Point(setup, rows, local, outcome.iteration_s, outcome.crowded)


def placements(dp: int = 8, gpu: str = "h20-141") -> Iterator[tuple[str, Point]]:
    """Qwen3-32B by WaS: placements, and an owner that is fair or lets its readers take turns."""
    d = node("Qwen3-32B", gpu, dp, 1)
    ways = {
        "layer, plain order": Setup(d, mode="was", peak_shifting=False),
        "layer, shifted": Setup(d, mode="was"),
        "striped": Setup(d, mode="was", placement="striped"),
        "layer, shifted, owners take turns": Setup(d, mode="was", fabric=Fabric(turns=True)),
        "striped, owners take turns": Setup(d, mode="was", placement="striped", fabric=Fabric(turns=True)),
    }
    for name, setup in ways.items():
        for rows in (32, 96, 128, 160, 192, 256, 384):
            yield name, steady(setup, rows)


def rings(rows: int = 192, dp: int = 8) -> Iterator[Point]:
    """Qwen3-32B on H20, compute a third longer than the fetch: rings from 1 slot to three cycles."""
    d = node("Qwen3-32B", "h20-141", dp, 1)
    for turns in (False, True):
        for placement, counts in (("layer", (1, 3, 7, 10, 14, 21, 28)), ("striped", (1, 2, 3, 4, 7))):
            for slots in counts:
                yield steady(Setup(d, mode="was", placement=placement, slots=slots, fabric=Fabric(turns=turns)), rows)


def sizes() -> Iterator[tuple[int, Point, int]]:
    """Llama-3.1-70B on B200, striped WaS, 512 rows, owners in turns: D = 2 ... 72, and the KV tokens of a rank."""
    for dp in (2, 4, 8, 16, 36, 72):
        d = node("Llama-3.1-70B", "b200", dp, 1)
        setup = Setup(d, mode="was", placement="striped", fabric=Fabric(turns=True))
        tokens = min(setup.kv_by_rank())
        yield dp, steady(setup, 512), tokens


@dataclass(frozen=True)
class Crossing:
    """The fewest decoding rows on each rank from which WaS is no slower than CaS, and from which fetches cost under 5 %; None: not
    up to MOST_ROWS. `fetch_s`: of one iteration's bytes over an idle link; `compute_s`: the iteration at 256 rows, all weights here."""

    gpu: str
    link: str
    turns: bool
    fetch_s: float
    compute_s: float
    was_rows: int | None
    hidden_rows: int | None


MOST_ROWS = 16384
_TRIED = (1, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, MOST_ROWS)


def crossings(model: str = "Qwen3-32B", gpus=("h20-141", "h200", "b200"), tried=_TRIED) -> Iterator[Crossing]:
    """Eight ranks, layers whole, by GPU and link, with fair owners and in turns."""
    for gpu in gpus:
        for link, gbps in LINKS.items():
            for turns in (False, True):
                d = replace(node(model, gpu, 8, 1), batched_tokens=MOST_ROWS)
                fabric = Fabric(gbps, gbps, turns=turns)
                setup = Setup(d, mode="was", fabric=fabric, most_requests=MOST_ROWS)
                plan = setup.memory()
                fetch_s = max(plan.fetched_bytes) / fabric.native(d, striped=False).ingress_bytes_per_s

                def hidden(rows, setup=setup) -> bool:
                    point = steady(setup, rows)
                    return point.iteration_s <= 1.05 * point.local_s

                def no_slower(rows, setup=setup) -> bool:
                    return steady(setup, rows).iteration_s <= steady(replace(setup, mode="cas"), rows).iteration_s

                compute_s = Rates(d, plan, setup.engine).iteration(256)
                yield Crossing(gpu, link, turns, fetch_s, compute_s, _first(tried, no_slower), _first(tried, hidden))


def _first(rising: tuple[int, ...], holds) -> int | None:
    """The first for which `holds`, which goes on holding; by halving."""
    if not holds(rising[-1]):
        return None
    low, high = -1, len(rising) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(rising[middle]) else (middle, high)
    return rising[high]


# A node of each kind: the GPU, what its link brings in (None: NVLink), and the most GPUs of one replica.
NODES = {
    "8 x H20 (96 GB), NVLink": ("h20", None, 8),
    "8 x H20 (141 GB), NVLink": ("h20-141", None, 8),
    "8 x H100 (80 GB), NVLink": ("h100", None, 8),
    "8 x H200, NVLink": ("h200", None, 8),
    "8 x B200, NVLink": ("b200", None, 8),
    "8 x H100 (80 GB), PCIe 5": ("h100", LINKS["PCIe 5"], 8),
    "8 hosts of one H200, 400G": ("h200", LINKS["400G"], 1),
}


@dataclass(frozen=True)
class Choice:
    """Answered tokens/s of the best of each kind, with its name; None: none fits."""

    node: str
    model: str
    seq: int
    replicas: tuple[str, float] | None
    pool: tuple[str, float] | None
    turns: tuple[str, float] | None


def choices(
    models=("Qwen3-32B", "Llama-3.1-70B"), seqs=(1024, 4096), nodes=NODES, tokens=4_000_000
) -> Iterator[Choice]:
    """Replicas of 1 to 8 GPUs against pools of them, layers whole, switching modes by themselves."""
    for name, (gpu, gbps, most_tp) in nodes.items():
        for model in models:
            for seq in seqs:
                kinds = {"replicas": {}, "pool": {}, "turns": {}}
                for tp in (n for n in (1, 2, 4, 8) if n <= most_tp):
                    d = node(model, gpu, 8 // tp, tp, seq)
                    if gbps:
                        d = replace(d, gpu=replace(d.gpu, link_bytes_per_s=gbps * 1e9))
                    setups = [("replicas", Setup(d, mode="local"))]
                    if tp < 8:
                        setups += [("pool", Setup(d)), ("turns", Setup(d, fabric=Fabric(turns=True)))]
                    requests = requests_of(seq, d.dp, tokens)
                    for kind, setup in setups:
                        if outcome := try_run(setup, requests):
                            kinds[kind][name_of(setup)] = outcome.tokens_per_s
                best = (max(ways.items(), key=lambda item: item[1], default=None) for ways in kinds.values())
                yield Choice(name, model, seq, *best)


def fetch_against_compute() -> Iterator[tuple[str, float, list[tuple[int, float]]]]:
    """Name, seconds to fetch the remote bytes of an iteration, and T(B) for some B with all weights here."""
    for gpu in ("h20-141", "h200", "b200"):
        for model, dp, tp in (("Qwen3-32B", 8, 1), ("Llama-3.1-70B", 4, 2)):
            setup = Setup(node(model, gpu, dp, tp), mode="was")
            plan = setup.memory()
            rates = Rates(setup.deployment, plan, setup.engine)
            fetch_s = max(plan.fetched_bytes) / setup.deployment.gpu.link_bytes_per_s
            points = [(rows, rates.iteration(rows)) for rows in (1, 4, 16, 64, 128, 256, 512, 1024, 2048)]
            yield f"{model}, {gpu}, TP={tp}, DP={dp}", fetch_s, points

"""What the simulator is for: which placement, how long a ring, how many ranks, how slow a link."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import workload
from .machine import Fabric, Rates
from .paper import node
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
    """The fewest rows tried at which WaS is no slower than CaS, and at which it costs under 5 %; None: none."""

    gpu: str
    link: str
    was_rows: int | None
    hidden_rows: int | None


def crossings(model: str = "Qwen3-32B") -> Iterator[Crossing]:
    for gpu in ("h20-141", "h200", "b200"):
        for link, gbps in LINKS.items():
            setup = Setup(node(model, gpu, 8, 1), mode="was", fabric=Fabric(gbps, gbps))
            was_rows = hidden_rows = None
            for rows in (1, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024):
                was = steady(setup, rows)
                if was_rows is None and was.iteration_s <= steady(replace(setup, mode="cas"), rows).iteration_s:
                    was_rows = rows
                if hidden_rows is None and was.iteration_s <= 1.05 * was.local_s:
                    hidden_rows = rows
            yield Crossing(gpu, link, was_rows, hidden_rows)

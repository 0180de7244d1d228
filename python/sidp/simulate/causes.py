"""What the paper's figures hang on: every experiment again with one assumption changed at a time.

A cause is switched on against the standing assumptions (fair owners, 2 % of jitter, rooflines, 2 ms of host time, free ranks), alone
unless its name says otherwise. Gains are beside the paper's; a ratio within 15 % of 1 is agreement.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import paper
from .machine import MEASURED_GEMM, Engine, Fabric
from .paper import Figure
from .setup import Setup, run

_NO_FETCH_COST = Fabric(1e5, 1e5, copy_bytes=0)


@dataclass(frozen=True)
class Effect:
    cause: str
    figures: tuple[Figure, ...]

    @property
    def reproduces(self) -> bool:
        return all(figure.agrees for figure in self.figures)


SHIFTING = {
    "as assumed": {},
    "no jitter": {"engine": Engine(jitter=0)},
    "jitter 0.1 %": {"engine": Engine(jitter=0.001)},
    "ranks in step at every iteration": {"step": "iteration"},
    "ranks in step at every layer": {"step": "layer"},
    "incast 0.25": {"fabric": Fabric(incast=0.25)},
    "incast 0.5": {"fabric": Fabric(incast=0.5)},
    "owners in turns": {"fabric": Fabric(turns=True)},
    "192 rows": {"rows": 192},
    "half the link": {"fabric": Fabric(187, 187)},
    "host time 20 ms": {"engine": Engine(host_s=20e-3)},
    "GEMMs as measured": {"engine": Engine(gemm=MEASURED_GEMM)},
    "plain order with 1 slot": {"plain_slots": 1},
    "no jitter, incast 0.25": {"engine": Engine(jitter=0), "fabric": Fabric(incast=0.25)},
    "no jitter, incast 0.5": {"engine": Engine(jitter=0), "fabric": Fabric(incast=0.5)},
    "plain order with 1 slot, in step at every layer": {"plain_slots": 1, "step": "layer"},
    "plain order with 1 slot, in step at every layer, owners in turns": {"plain_slots": 1, "step": "layer", "fabric": Fabric(turns=True)},
    **{
        f"plain order with 2 slots, in step at every layer, no jitter, incast {incast}": {
            "plain_slots": 2, "step": "layer", "engine": Engine(jitter=0), "fabric": Fabric(incast=incast),
        }
        for incast in (0.25, 0.5)
    },
}  # fmt: skip


def shifting(causes=SHIFTING) -> Iterator[Effect]:
    for cause, change in causes.items():
        stated = ((4, 2.5), (8, 3.4))
        yield Effect(cause, tuple(Figure(f"DP={dp}", x, x, paper.shifting(dp, **change)) for dp, x in stated))


_REQUEST = Fabric(round_trip_s=200e-6)
LADDER = {
    "as assumed (in step at every iteration)": {},
    "in step at every layer": {"step": "layer"},
    "no jitter": {"engine": Engine(jitter=0)},
    "0.2 ms of host time a request": {"fabric": _REQUEST},
    "0.2 ms of host time a layer": {"engine": Engine(layer_s=200e-6)},
    "half the link": {"fabric": Fabric(187, 187)},
    "GEMMs as measured": {"engine": Engine(gemm=MEASURED_GEMM)},
    "in step at every layer, 0.1 ms a request": {"step": "layer", "fabric": Fabric(round_trip_s=100e-6)},
    "in step at every layer, 0.2 ms a request": {"step": "layer", "fabric": _REQUEST},
    "in step at every layer, 0.3 ms a request": {"step": "layer", "fabric": Fabric(round_trip_s=300e-6)},
    "in step at every layer, 0.2 ms a layer": {"step": "layer", "engine": Engine(layer_s=200e-6)},
    "the same on H200": {"step": "layer", "engine": Engine(layer_s=200e-6), "gpu": "h200"},
    "the same, TP=1, DP=8": {"step": "layer", "engine": Engine(layer_s=200e-6), "dp": 8, "tp": 1},
}


def ladder(causes=LADDER) -> Iterator[Effect]:
    """Each step over v3."""
    for cause, change in causes.items():
        steps = paper.ladder(**change)
        last = steps["v3"].seconds
        stated = ((name, paper.LADDER[name] / paper.LADDER["v3"]) for name in ("gather", "v1", "v2"))
        yield Effect(cause, tuple(Figure(f"{n} / v3", x, x, steps[n].seconds / last) for n, x in stated))


@dataclass(frozen=True)
class Job:
    """Llama-3.1-70B at TP=2, DP=4, against replicas of the same shape."""

    name: str
    gpu: str
    seq: int
    mode: str
    low: float
    high: float
    tail: bool = False

    def gain(self, utilization=0.9, engine=None, fabric=None, prompt=0.5, most_requests=1024, step="free",
             placement="layer", tokens=paper.JOB_TOKENS) -> float:  # fmt: skip
        d = paper.node("Llama-3.1-70B", self.gpu, 4, 2, self.seq, utilization)
        requests = paper.job_of_a_tail(4) if self.tail else paper.requests_of(self.seq, 4, tokens, prompt)
        replicas = Setup(d, mode="local", engine=engine or Engine(), most_requests=most_requests)
        pool = replace(replicas, mode=self.mode, fabric=fabric or Fabric(), step=step, placement=placement)
        return run(replicas, requests).seconds / run(pool, requests).seconds


JOBS = (
    Job("H20, 1K", "h20-141", 1024, "auto", 1.0, 1.0),
    Job("H20, 4K", "h20-141", 4096, "auto", 1.3, 1.5),
    Job("H200, 1K", "h200", 1024, "auto", 1.0, 1.0),
    Job("H200, 4K", "h200", 4096, "auto", 1.3, 1.5),
    Job("tail, H20, WaS", "h20-141", 1024, "was", 1.07, 1.09, tail=True),
    Job("tail, H20, auto", "h20-141", 1024, "auto", 1.27, 1.32, tail=True),
    Job("tail, H200, WaS", "h200", 1024, "was", 1.07, 1.09, tail=True),
    Job("tail, H200, auto", "h200", 1024, "auto", 1.27, 1.32, tail=True),
)
THROUGHPUT = {
    "as assumed": {},
    "no jitter": {"engine": Engine(jitter=0)},
    "owners in turns": {"fabric": Fabric(turns=True)},
    "striped": {"placement": "striped"},
    "twice the link, owners in turns": {"fabric": Fabric(750, 750, turns=True)},
    "fetches cost nothing": {"fabric": _NO_FETCH_COST},
    "incast 0.25": {"fabric": Fabric(incast=0.25)},
    "in step at every iteration": {"step": "iteration"},
    "host time 20 ms": {"engine": Engine(host_s=20e-3)},
    "GEMMs as measured": {"engine": Engine(gemm=MEASURED_GEMM)},
    "attention three times its roofline": {"engine": Engine(attention=3.0)},
    "prompts a tenth of the tokens": {"prompt": 0.1},
    "prompts nine tenths": {"prompt": 0.9},
    "at most 256 running": {"most_requests": 256},
    "memory capped at 0.6": {"utilization": 0.6},
    "fetches cost nothing, host time 20 ms": {"fabric": _NO_FETCH_COST, "engine": Engine(host_s=20e-3)},
    "fetches cost nothing, memory capped at 0.6": {"fabric": _NO_FETCH_COST, "utilization": 0.6},
    "memory capped at 0.6, twice the link, owners in turns": {
        "utilization": 0.6,
        "fabric": Fabric(750, 750, turns=True),
    },
    "fetches cost nothing, host time 200 ms": {"fabric": _NO_FETCH_COST, "engine": Engine(host_s=200e-3)},
}


def throughput(jobs=JOBS, causes=THROUGHPUT) -> Iterator[Effect]:
    for cause, change in causes.items():
        yield Effect(cause, tuple(Figure(job.name, job.low, job.high, job.gain(**change)) for job in jobs))

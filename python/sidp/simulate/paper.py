"""The paper's experiments in the simulator, each figure beside the paper's. One set of assumptions for all of them.

The paper names models, GPUs and settings only in part; what had to be chosen stands in each experiment, once, whatever comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..errors import ConfigError
from ..planner.capacity import Deployment
from ..planner.gpus import load_gpu
from ..planner.models import load_model
from . import workload
from .machine import Engine, Fabric
from .setup import Outcome, Setup, run

AGREES = 0.15


@dataclass(frozen=True)
class Figure:
    """`low` and `high` bound what the paper says; `why` explains a difference of more than AGREES."""

    what: str
    low: float
    high: float
    simulated: float
    why: str = ""
    unit: str = "x"

    @property
    def ratio(self) -> float:
        """Simulated over the nearest end of what the paper says; 1 within."""
        return self.simulated / min(max(self.simulated, self.low), self.high)

    @property
    def agrees(self) -> bool:
        return abs(self.ratio - 1) <= AGREES


def node(model: str, gpu: str, dp: int, tp: int, seq: int = 1024, utilization: float = 0.9) -> Deployment:
    return Deployment(load_model(model), load_gpu(gpu), dp, tp, seq=seq, utilization=utilization)


def capacity() -> Iterator[Figure]:
    """KV tokens; the paper's node is read as 8 GPUs of 141 GB."""
    for model in ("Llama-3.1-70B", "Qwen2.5-72B"):
        d = node(model, "h200", 4, 2)
        gain = sum(Setup(d).kv_by_rank()) / sum(Setup(d, mode="local").kv_by_rank())
        yield Figure(f"KV tokens against replicas, {model}, TP=2, DP=4", 1.7, 1.7, gain)
    for model in ("Llama-3.1-70B", "Qwen2.5-72B"):
        tokens = sum(Setup(node(model, "h200", 8, 1)).kv_by_rank()) / 1e6
        why = (
            "the arithmetic leaves this much of 141 GB; with memory capped at 0.6, or on the 96 GB H20, it gives 0.6 to 1.0 M. "
            "Which cap and ring stand behind the paper's figure is not known"
        )
        yield Figure(f"KV tokens, {model}, TP=1, DP=8", 1.0, 1.0, tokens, why, "M")


def _baselines(model: str, gpu: str, seq: int, utilization: float) -> Iterator[Setup]:
    for dp, tp, stages in ((8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (1, 2, 4), (1, 4, 2)):
        yield Setup(node(model, gpu, dp, tp, seq, utilization), mode="local", stages=stages)


def _pools(model: str, gpu: str, seq: int, utilization: float) -> Iterator[Setup]:
    for dp, tp, placement in ((8, 1, "layer"), (4, 2, "layer")):
        yield Setup(node(model, gpu, dp, tp, seq, utilization), placement=placement)


def _best(setups: Iterator[Setup], requests: Callable[[Setup], list]) -> Outcome | None:
    outcomes = []
    for setup in setups:
        try:
            outcomes.append(run(setup, requests(setup)))
        except ConfigError:  # does not fit: no candidate
            continue
    return max(outcomes, key=lambda outcome: outcome.tokens_per_s, default=None)


def name_of(setup: Setup) -> str:
    d = setup.deployment
    way = "replicas" if setup.mode == "local" and d.dp > 1 else "" if setup.mode == "local" else setup.placement
    return " ".join(p for p in (f"TP{d.tp}", f"PP{setup.stages}" if setup.stages > 1 else "", f"DP{d.dp}", way) if p)


@dataclass(frozen=True)
class Throughput:
    """The best of the usual ways against the best pool, answered tokens/s of 8 GPUs."""

    model: str
    gpu: str
    seq: int
    base: Outcome
    pool: Outcome

    @property
    def gain(self) -> float:
        return self.pool.tokens_per_s / self.base.tokens_per_s


_JOB_TOKENS = 3_000_000  # more than a node's KV cache holds


def throughput(
    models=("Llama-3.1-70B",), gpus=("h20-141", "h200", "b200"), seqs=(1024, 2048, 4096), utilization=0.9
) -> Iterator[Throughput]:
    """Requests of `seq` tokens in the mean, half of them prompt, lengths spread by half; all there at the start."""
    for model in models:
        for gpu in gpus:
            for seq in seqs:

                def requests(setup: Setup, seq=seq) -> list:
                    count = _JOB_TOKENS // seq
                    return workload.job(count, seq // 2, seq // 2, spread=0.5, ranks=setup.deployment.dp)

                base = _best(_baselines(model, gpu, seq, utilization), requests)
                pool = _best(_pools(model, gpu, seq, utilization), requests)
                if base and pool:
                    yield Throughput(model, gpu, seq, base, pool)


SHIFTING = {  # how far two assumptions carry: ranks in perfect step or not, a fabric that loses nothing or much to incast
    "fair fabric, no jitter": (Fabric(), 0.0),
    "fair fabric, jitter 2 %": (Fabric(), 0.02),
    "incast 0.5, no jitter": (Fabric(incast=0.5), 0.0),
    "incast 0.5, jitter 2 %": (Fabric(incast=0.5), 0.02),
}


def shifting() -> Iterator[Figure]:
    """Qwen3-32B on H20, WaS, layers placed whole, sidp's own number of slots, 32 rows: fetches are not hidden."""
    why = (
        "no measurement of what NVLink loses to incast is known to us. With jitter the shifted order falls apart and gains "
        "nothing, whatever the loss; the paper's ranks must be held in step by something that is not in this model"
    )
    for name, (fabric, jitter) in SHIFTING.items():
        for dp, paper in ((2, 1.0), (4, 2.5), (8, 3.4)):
            d = node("Qwen3-32B", "h20-141", dp, 1)
            setup = Setup(d, mode="was", fabric=fabric, engine=Engine(jitter=jitter))
            requests = workload.decoding(dp, 32, 12, 768)
            with_it, without = (run(replace(setup, peak_shifting=on), requests) for on in (True, False))
            yield Figure(f"peak shifting, DP={dp}, {name}", paper, paper, without.seconds / with_it.seconds, why)


def _job_of_a_tail(setup: Setup) -> list:
    return workload.job(1000, 512, 512, spread=0.9, ranks=setup.deployment.dp, seed=1)


def switching(gpu: str = "h20-141", model: str = "Llama-3.1-70B") -> dict[str, Outcome]:
    """A job whose answers differ in length: replicas, then pools in WaS, CaS and switching; TP=2, DP=4, 1K."""
    d = node(model, gpu, 4, 2)
    setups = {
        "replicas": Setup(d, mode="local"),
        **{m: Setup(d, mode=m, placement="striped") for m in ("was", "cas", "auto")},
    }
    return {name: run(setup, _job_of_a_tail(setup), trace=True) for name, setup in setups.items()}


def ladder(gpu: str = "h20-141", dp: int = 4, tp: int = 2) -> dict[str, Outcome]:
    """One request of 300 answered tokens (the paper names none), Llama-3.1-70B."""
    d = node("Llama-3.1-70B", gpu, dp, tp)
    steps = {
        "gather": Setup(d, mode="gather"),
        "v1": Setup(d, mode="cas", fuse=False, lockstep=True),
        "v2": Setup(d, mode="cas", lockstep=True),
        "v3": Setup(d, mode="cas"),
    }
    request = workload.job(1, 128, 300, ranks=dp)
    return {name: run(setup, request) for name, setup in steps.items()}

"""The paper's experiments in the simulator, each figure beside the paper's. One set of assumptions for all of them.

The paper names models, GPUs and settings only in part; what had to be chosen stands in each experiment, once, whatever comes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import ConfigError
from ..planner.capacity import Deployment
from ..planner.gpus import load_gpu
from ..planner.models import load_model
from . import workload
from .machine import Fabric
from .setup import Outcome, Setup, run

AGREES = 0.15


@dataclass(frozen=True)
class Figure:
    """`low` and `high` bound what the paper says. What a difference of more than AGREES comes from: sidp.simulate.causes."""

    what: str
    low: float
    high: float
    simulated: float
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
        yield Figure(f"KV tokens, {model}, TP=1, DP=8", 1.0, 1.0, tokens, "M")


def _baselines(model: str, gpu: str, seq: int, utilization: float) -> Iterator[Setup]:
    for dp, tp, stages in ((8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (1, 2, 4), (1, 4, 2)):
        yield Setup(node(model, gpu, dp, tp, seq, utilization), mode="local", stages=stages)


def _pools(model: str, gpu: str, seq: int, utilization: float) -> Iterator[Setup]:
    for dp, tp, placement in ((8, 1, "layer"), (4, 2, "layer")):
        yield Setup(node(model, gpu, dp, tp, seq, utilization), placement=placement)


def try_run(setup: Setup, requests: list, trace: bool = False) -> Outcome | None:
    """None where it does not fit."""
    try:
        return run(setup, requests, trace)
    except ConfigError:
        return None


def name_of(setup: Setup) -> str:
    d = setup.deployment
    parts = [f"TP{d.tp}"]
    parts += [f"PP{setup.stages}"] if setup.stages > 1 else []
    parts += [f"DP{d.dp}"] if d.dp > 1 else []
    parts += [setup.placement] if setup.mode != "local" else ["replicas"] if d.dp > 1 else []
    return " ".join(parts)


@dataclass(frozen=True)
class Throughput:
    """Answered tokens/s of 8 GPUs by way, those that fit; `pools` with owners that are fair, `turns` in turns."""

    model: str
    gpu: str
    seq: int
    utilization: float
    replicas: dict[str, Outcome]
    pools: dict[str, Outcome]
    turns: dict[str, Outcome]

    def best(self, ways: str) -> tuple[str, Outcome] | None:
        return max(getattr(self, ways).items(), key=lambda item: item[1].tokens_per_s, default=None)

    def gain(self, pools: str = "pools", over: str | None = None) -> float | None:
        """Of the best pool over the best of the usual ways, or the one named."""
        pool, base = self.best(pools), (over, self.replicas.get(over)) if over else self.best("replicas")
        return pool[1].tokens_per_s / base[1].tokens_per_s if pool and base and base[1] else None


JOB_TOKENS = 6_000_000  # some waves of what a node's KV cache holds


def requests_of(seq: int, ranks: int, tokens: int = JOB_TOKENS, prompt: float = 0.5) -> list:
    """Requests of `seq` tokens in the mean, the share `prompt` of them prompt, lengths spread by half; all there at the start."""
    prompts = round(seq * prompt)
    return workload.job(tokens // seq, prompts, seq - prompts, spread=0.5, ranks=ranks)


def throughput(
    models=("Llama-3.1-70B", "Qwen2.5-72B", "Qwen3-32B"),
    gpus=("h20-141", "h200", "b200"),
    seqs=(1024, 2048, 4096),
    utilization=0.9,
    tokens=JOB_TOKENS,
) -> Iterator[Throughput]:
    """Every way to run each model on 8 GPUs."""
    for model in models:
        for gpu in gpus:
            for seq in seqs:

                def outcomes(setups, seq=seq) -> dict[str, Outcome]:
                    tried = ((s, try_run(s, requests_of(seq, s.deployment.dp, tokens))) for s in setups)
                    return {name_of(setup): outcome for setup, outcome in tried if outcome}

                pools = list(_pools(model, gpu, seq, utilization))
                turns = [replace(s, fabric=Fabric(turns=True)) for s in pools]
                baselines = outcomes(_baselines(model, gpu, seq, utilization))
                yield Throughput(model, gpu, seq, utilization, baselines, outcomes(pools), outcomes(turns))


def shifting(dp: int, rows: int = 32, plain_slots: int | None = None, **rest) -> float:
    """Gain of peak shifting: Qwen3-32B on H20, WaS, layers placed whole, decoding; sidp's own ring, or one of
    `plain_slots` for the plain order. `rest` goes into both Setups."""
    setup = Setup(node("Qwen3-32B", "h20-141", dp, 1), mode="was", kv_tokens=10**9, **rest)
    requests = workload.decoding(dp, rows, 12, 768)
    plain = replace(setup, peak_shifting=False, slots=plain_slots or setup.slots)
    return run(plain, requests).seconds / run(setup, requests).seconds


def job_of_a_tail(ranks: int) -> list:
    return workload.job(3000, 512, 512, spread=0.9, ranks=ranks, seed=1)


def switching(gpu: str = "h20-141", model: str = "Llama-3.1-70B", placement: str = "layer") -> dict[str, Outcome]:
    """A job whose answers differ in length: replicas, then pools in WaS, CaS and switching; TP=2, DP=4, 1K."""
    d = node(model, gpu, 4, 2)
    setups = {
        "replicas": Setup(d, mode="local"),
        **{m: Setup(d, mode=m, placement=placement) for m in ("was", "cas", "auto")},
    }
    return {name: run(setup, job_of_a_tail(4), trace=True) for name, setup in setups.items()}


LADDER = {"gather": 33.0, "v1": 25.0, "v2": 19.0, "v3": 12.0}  # seconds in the paper


def ladder(gpu: str = "h20-141", dp: int = 4, tp: int = 2, step: str = "iteration", **rest) -> dict[str, Outcome]:
    """One request of 300 answered tokens (the paper names none), Llama-3.1-70B. `step`: what v1 and v2 begin together; from
    v3 on ranks without requests do nothing. `rest` goes into all Setups."""
    d = node("Llama-3.1-70B", gpu, dp, tp)
    steps = {
        "gather": Setup(d, mode="gather", **rest),
        "v1": Setup(d, mode="cas", fuse=False, step=step, **rest),
        "v2": Setup(d, mode="cas", step=step, **rest),
        "v3": Setup(d, mode="cas", **rest),
    }
    request = workload.job(1, 128, 300, ranks=dp)
    return {name: run(setup, request) for name, setup in steps.items()}

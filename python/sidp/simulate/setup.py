"""One way to run a job on a node, and what comes out of simulating it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .._native import C
from ..config import PLACEMENTS
from ..errors import ConfigError
from ..planner.capacity import Deployment, MemoryPlan, pooled, replicated
from ..policy import _LINK_EVERY
from .machine import Engine, Fabric, Rates, policies

MODES = ("local", "was", "cas", "auto", "gather")
STEPS = ("free", "iteration", "layer")
_GATHER_BUFFERS = 2  # units: one in use, one being gathered


@dataclass(frozen=True)
class Setup:
    """A node and how its ranks reach the weights.

    Args:
        deployment: model, GPU, dp replicas of tp GPUs, memory settings.
        mode: "local" (replicas hold all weights), "was", "cas", "auto", or "gather" (FSDP: all ranks gather each layer together).
        stages: of a pipeline within a replica, each of tp GPUs; mode "local" only.
        placement, slots, peak_shifting: as in PoolConfig.
        fuse: whether a CaS server takes requests for one unit together.
        step: what all ranks begin together: nothing ("free", as in sidp), each "iteration" or each "layer". With the last two,
            a rank without requests runs a row for nothing.
        most_requests: running in one batch, as engines limit it.
        kv_tokens: of a rank; None takes what the planner finds room for.
        seed: of the engine's jitter.
    """

    deployment: Deployment
    mode: str = "auto"
    stages: int = 1
    placement: str = "layer"
    slots: int | None = None
    peak_shifting: bool = True
    fuse: bool = True
    step: str = "free"
    most_requests: int = 1024
    kv_tokens: int | None = None
    seed: int = 0
    engine: Engine = field(default_factory=Engine)
    fabric: Fabric = field(default_factory=Fabric)

    def __post_init__(self):
        for name, allowed in (("mode", MODES), ("placement", PLACEMENTS), ("step", STEPS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.stages > 1 and self.mode != "local":
            raise ConfigError(f"stages={self.stages} goes with mode='local', got mode={self.mode!r}")

    @property
    def gpus(self) -> int:
        return self.deployment.dp * self.deployment.tp * self.stages

    def memory(self) -> MemoryPlan:
        """Where one GPU's bytes go."""
        if self.mode == "local":
            plan = replicated(self.deployment)
            if self.stages == 1:
                return plan
            # a stage holds its part of the layers, their cache, and at most one of embedding and head: even parts
            return replace(
                plan,
                other_bytes=plan.other_bytes // self.stages,
                ffn_bytes=tuple(n // self.stages for n in plan.ffn_bytes),
                kv_bytes_per_token=plan.kv_bytes_per_token // self.stages,
            )
        if self.mode == "gather":
            return pooled(self.deployment, "striped", _GATHER_BUFFERS)
        return pooled(self.deployment, self.placement, self.slots)

    def kv_by_rank(self) -> list[int]:
        plan = self.memory()
        return [plan.kv_tokens(rank) if self.kv_tokens is None else self.kv_tokens for rank in range(plan_ranks(plan))]


def plan_ranks(plan: MemoryPlan) -> int:
    return len(plan.ffn_bytes)


@dataclass(frozen=True)
class Outcome:
    """What a simulated job did. `native` is the core's result: per rank, per request, per link."""

    setup: Setup
    native: object
    kv_tokens: tuple[int, ...]

    @property
    def seconds(self) -> float:
        return self.native.end_s

    @property
    def tokens(self) -> int:
        return sum(rank.tokens for rank in self.native.ranks)

    @property
    def tokens_per_s(self) -> float:
        """Answered tokens of the node."""
        return self.tokens / self.seconds

    @property
    def iteration_s(self) -> float:
        """Mean over all iterations that had requests."""
        return sum(r.busy_s for r in self.native.ranks) / sum(r.iterations for r in self.native.ranks)

    @property
    def stalled(self) -> float:
        """Share of the time in iterations that ranks waited for fetches."""
        return sum(r.stall_s for r in self.native.ranks) / sum(r.busy_s for r in self.native.ranks)

    @property
    def fetched_bytes(self) -> int:
        return sum(n for reader, row in enumerate(self.native.read) for owner, n in enumerate(row) if owner != reader)

    @property
    def crowded(self) -> float:
        """Of the time in which an owner feeds a reader, the share in which it feeds more than one."""
        return sum(self.native.crowded_s) / max(1e-30, sum(self.native.feeding_s))


def run(setup: Setup, requests: Sequence, trace: bool = False) -> Outcome:
    """Simulates the job of `requests` (sidp.simulate.workload) to its last token.

    Raises:
        ConfigError: the weights or one of the requests do not fit.
    """
    d = setup.deployment
    plan, kv = setup.memory(), setup.kv_by_rank()
    if min(kv) < 1:
        raise ConfigError(
            f"{d.model.name} does not fit {d.gpu.name} with dp={d.dp}, tp={d.tp}, mode={setup.mode!r}: no KV token is left"
        )
    if setup.mode not in ("local", "gather") and not plan.active:
        raise ConfigError(f"a pool would keep its weights local here: {plan.reason}; simulate mode='local'")
    striped = setup.mode in ("local", "gather") or setup.placement == "striped"
    placement = C.Placement("striped" if striped else "layer", d.layouts, d.dp)
    rates, fabric = Rates(d, plan, setup.engine), setup.fabric.native(d, striped)
    job = C.SimJob()
    job.compute, job.fabric = rates.native(setup.stages), fabric
    job.options = _options(setup, trace)
    job.slots, job.kv_tokens, job.requests = list(plan.slots), kv, list(requests)
    if setup.mode == "auto":
        job.policies = policies(d, placement, plan.slots, fabric, rates)
    return Outcome(setup, C.simulate(placement, job), tuple(kv))


def _options(setup: Setup, trace: bool):
    options = C.SimOptions()
    options.reach = getattr(C.SimReach, setup.mode)
    options.stages, options.peak_shifting = setup.stages, setup.peak_shifting
    options.fuse, options.step = setup.fuse, getattr(C.SimStep, setup.step)
    options.look_every = _LINK_EVERY
    options.batched_tokens, options.most_requests = setup.deployment.batched_tokens, setup.most_requests
    options.jitter, options.seed, options.trace = setup.engine.jitter, setup.seed, trace
    return options

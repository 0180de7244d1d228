"""What the figures say: which placement, how many slots, and whether pooling pays at all."""

from __future__ import annotations

from dataclasses import dataclass

from .capacity import Deployment, MemoryPlan, pooled, replicated
from .crossover import Clock, Timing

WORTHWHILE = 0.08  # gains below this are not worth a pool
_PLACEMENT_MATTERS = 0.02  # of KV tokens; below it, whole layers (longer copies) are preferred
_SMALL_COPY = 16 * 2**20  # bytes; shorter copies do not reach a link's rate


@dataclass(frozen=True)
class Option:
    """One way to run the node. `job` is the mean iteration at the full batch, None where no request fits.

    `requests_per_s` of the node is an estimate from rooflines or the profile, for a job that keeps every replica full.
    """

    memory: MemoryPlan
    clock: Clock
    job: Timing | None
    requests_per_s: float

    @property
    def name(self) -> str:
        return self.memory.kind


@dataclass(frozen=True)
class Plan:
    """Replicated first, then the placements that were asked for. `best` is the advised one of all."""

    deployment: Deployment
    options: tuple[Option, ...]
    best: Option
    advice: tuple[str, ...]

    @property
    def replicated(self) -> Option:
        return self.options[0]

    @property
    def pooled(self) -> tuple[Option, ...]:
        return self.options[1:]

    def gain(self, option: Option) -> float | None:
        """KV tokens of the node over the replicated ones; None where replicas hold none."""
        base = self.replicated.memory.node_kv_tokens
        return option.memory.node_kv_tokens / base if base else None

    def speedup(self, option: Option) -> float | None:
        base = self.replicated.requests_per_s
        return option.requests_per_s / base if base else None


def make_plan(deployment: Deployment, placement: str | None = None, slots: int | None = None) -> Plan:
    """Compares replicas with a pool of `placement` (None: both kinds). Raises ConfigError."""
    kinds = (placement,) if placement else ("layer", "striped")
    if placement is None and deployment.dp > deployment.model.layers:
        kinds = ("striped",)
    memories = [replicated(deployment), *(pooled(deployment, kind, slots) for kind in kinds)]
    options = tuple(_option(deployment, memory) for memory in memories)
    draft = Plan(deployment, options, _best(options[1:]), ())
    lines = _advise(draft)
    return Plan(deployment, options, draft.best if lines.pays else options[0], tuple(lines.text))


def _option(deployment: Deployment, memory: MemoryPlan) -> Option:
    clock = Clock(deployment, memory)
    batches = [memory.kv_tokens(rank) // deployment.seq for rank in range(deployment.dp)]
    if not memory.fits:
        return Option(memory, clock, None, 0.0)
    answer = deployment.seq - deployment.prompt_tokens
    rate = 0.0
    for batch in batches:
        job = clock.job(batch)
        rate += batch / answer / min(job.was, job.cas)
    return Option(memory, clock, clock.job(memory.batch), rate)


def _best(candidates: tuple[Option, ...]) -> Option:
    first = candidates[0]
    for other in candidates[1:]:
        if other.memory.node_kv_tokens > (1 + _PLACEMENT_MATTERS) * first.memory.node_kv_tokens:
            first = other
    return first


@dataclass
class _Advice:
    pays: bool
    text: list[str]


def _advise(plan: Plan) -> _Advice:
    option, base, seq = plan.best, plan.replicated, plan.deployment.seq
    memory = option.memory
    if not memory.active:
        return _Advice(False, [f"Do not pool: {memory.reason}."])
    if not memory.fits:
        return _Advice(False, [_does_not_fit(plan, option)])
    slots = max(memory.slots)
    use = f"placement='{option.name}', slots={slots}"
    if not base.memory.fits:
        text = [f"Pool: replicas do not hold one request of {seq} tokens, a pool does ({use})."]
        return _Advice(True, [*text, *_remarks(plan, option)])
    gain, speedup = plan.gain(option) - 1, plan.speedup(option) - 1
    if gain < WORTHWHILE:
        text = f"Pooling does not pay here: {gain:+.1%} KV tokens, under {WORTHWHILE:.0%}. Run it replicated."
        return _Advice(False, [text, *_remarks(plan, option)])
    figures = f"{gain:+.0%} KV tokens, {speedup:+.0%} estimated requests/s"
    if speedup < 0:
        text = f"Pooling costs speed here ({figures}). Pool only if the room itself is what you need."
    elif speedup < WORTHWHILE:
        text = (
            f"Pooling brings room, hardly speed ({figures}, under {WORTHWHILE:.0%}): by the roofline the replicas' "
            f"batch of {base.memory.batch:,} keeps the GPU busy already; an engine's overheads may differ."
        )
    else:
        return _Advice(True, [f"Pool: {figures} ({use}).", *_remarks(plan, option)])
    return _Advice(False, [text, f"If you pool: {use}.", *_remarks(plan, option)])


def _does_not_fit(plan: Plan, option: Option) -> str:
    short = -option.memory.kv_bytes(option.memory.tightest)
    what = f"{short / 1e9:.1f} GB of memory are missing on a GPU" if short > 0 else "no whole request fits"
    return f"It does not fit, pooled or not: {what}. Raise --tp or --dp, take a larger GPU, or shorten --seq."


def _remarks(plan: Plan, option: Option) -> list[str]:
    lines, memory, clock = [], option.memory, option.clock
    job = option.job
    if job.compute < job.fetch:
        hidden = clock.hidden_rows()
        enough = f"{hidden:,} decoding requests would hide them" if hidden else "no batch hides them"
        lines.append(
            f"Fetches ({job.fetch * 1e3:.0f} ms) outlast the mean iteration ({job.compute * 1e3:.0f} ms) at the full "
            f"batch of {memory.batch:,}; {enough}. More TP (less to fetch) or shorter requests help."
        )
    copies = memory.largest_copy_bytes
    if copies < _SMALL_COPY:
        lines.append(
            f"A fetch is cut into copies of at most {copies / 2**20:.1f} MiB: too short for a link's full rate, so "
            f"expect longer fetches than shown."
        )
    others = [other for other in plan.pooled if other is not option]
    for other in others:
        lines.append(
            f"{other.name.capitalize()} placement needs {max(other.memory.slots)} slots: "
            f"{other.memory.node_kv_tokens:,} KV tokens on the node against {memory.node_kv_tokens:,}."
        )
    return lines

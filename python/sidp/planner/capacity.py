"""Where the bytes of a GPU go, replicated and pooled, and how many tokens of KV cache the rest holds.

Shares and slots come from the native placement, the one that the pool itself lays its memory out with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from .._native import C
from ..backups import BACKUPS, BackupPlan, check_backup_on_gpus, check_redundancy
from ..batch.attention import DECODE_PAGE
from ..batch.memory import SPARE_PAGES
from ..config import PLACEMENTS
from ..errors import ConfigError
from ..shares import unit_layout
from ..slots import choose_slots
from .gpus import GPU
from .models import ModelShape

ENGINES = ("vllm", "transformers")


@dataclass(frozen=True)
class Deployment:
    """A node of dp x tp GPUs: `dp` replicas of `tp` GPUs each.

    Args:
        seq: tokens of a request, prompt and answer.
        prompt: tokens of its prompt; None takes half of seq.
        utilization: share of the GPU's memory that the engine may use.
        batched_tokens: rows of the largest forward, which sizes the activations.
        reserve_bytes: CUDA context, NCCL and library workspaces, fragmentation; of one rank.
        sampled: sequences whose logits are computed at once, at most (1024 is vLLM's offline default on large GPUs).
        engine: "vllm", which reads the KV cache where it lies, or "transformers", whose paged attention copies the keys
            and values that it reads, a layer at a time.
        ranks_per_gpu: replicas that share a GPU's memory evenly and, pooled by layer, read each other's layers in place.
        backup: where every unit's second copy is ("peer" or "host"), for a group that survives a loss; None: nowhere.
    """

    model: ModelShape
    gpu: GPU
    dp: int
    tp: int = 1
    seq: int = 1024
    prompt: int | None = None
    utilization: float = 0.9
    batched_tokens: int = 8192
    reserve_bytes: int = 2**30
    sampled: int = 1024
    engine: str = "vllm"
    ranks_per_gpu: int = 1
    backup: str | None = None

    def __post_init__(self):
        for name in ("dp", "seq", "batched_tokens", "sampled", "ranks_per_gpu"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be an integer of 1 or more, got {value!r}")
        if self.prompt is not None and not 0 <= self.prompt < self.seq:
            raise ConfigError(f"prompt must be 0 ... {self.seq - 1} tokens (less than seq), got {self.prompt!r}")
        if not 0 < self.utilization <= 1:
            raise ConfigError(f"utilization must be above 0 and at most 1, got {self.utilization}")
        if self.reserve_bytes < 0:
            raise ConfigError(f"the reserve must be 0 bytes or more, got {self.reserve_bytes}")
        if self.engine not in ENGINES:
            raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.dp % self.ranks_per_gpu or (self.ranks_per_gpu > 1 and self.tp > 1):
            raise ConfigError(
                f"ranks_per_gpu={self.ranks_per_gpu} must divide dp={self.dp}, and replicas of tp={self.tp} GPUs share none"
            )
        check_redundancy(int(self.backup is not None), self.backup or BACKUPS[0])
        check_backup_on_gpus(self.backup)
        self.model.check_tp(self.tp)

    @property
    def prompt_tokens(self) -> int:
        return self.seq // 2 if self.prompt is None else self.prompt

    @property
    def context(self) -> int:
        """Tokens that a running request has in its KV cache, on average over its answer."""
        return (self.seq + self.prompt_tokens) // 2

    @cached_property
    def layouts(self) -> list:
        """Native layouts of one GPU's units."""
        made: dict = {}  # equal layers share one
        return [
            made[unit] if unit in made else made.setdefault(unit, unit_layout(unit))
            for unit in self.model.units(self.tp)
        ]

    def activation_bytes(self) -> int:
        """The larger of an FFN's forward (its three intermediates and three hidden states a row) and of sampling
        (logits in the model's dtype and in float32, and their probabilities)."""
        model, size = self.model, self.model.dtype.itemsize
        inner = max(ffn.inner for ffn in model.ffns) // self.tp
        forward = self.batched_tokens * 3 * (inner + model.hidden) * size
        sampling = min(self.sampled, self.batched_tokens) * model.vocabulary * (size + 8)
        return max(forward, sampling)

    def engine_bytes(self) -> int:
        """Of the engine's KV cache, what it keeps to itself: its pages for padding, and what is less than a page."""
        if self.engine == "vllm":
            return 0
        return (SPARE_PAGES * DECODE_PAGE + DECODE_PAGE // 2) * self.model.kv_bytes_per_token(self.tp)

    def engine_bytes_per_token(self) -> int:
        """Beside each token in the KV cache: the copy of one layer's keys and values and two indices, or nothing."""
        if self.engine == "vllm":
            return 0
        return self.model.kv_bytes_per_token(self.tp) // self.model.layers + 16

    def read_in_place(self, placement, kind: str, rank: int) -> list[bool]:
        """By layer: whether it lies on the GPU of `rank`. Ranks go round the GPUs."""
        gpus = self.dp // self.ranks_per_gpu
        layers = range(self.model.layers)
        if kind != "layer":
            return [placement.local(layer, rank) for layer in layers]
        return [placement.local(layer, rank) or placement.owner(layer) % gpus == rank % gpus for layer in layers]


@dataclass(frozen=True)
class MemoryPlan:
    """One GPU of every rank; lists are by rank of the pool (= replica), bytes on one of the replica's GPUs.

    `kind`: "replicated", "layer" or "striped". `active` is False where the pool would keep weights local, for `reason`.
    """

    kind: str
    active: bool
    reason: str
    slots: tuple[int, ...]
    usable_bytes: int
    other_bytes: int
    ffn_bytes: tuple[int, ...]
    ring_bytes: tuple[int, ...]
    activation_bytes: int
    reserve_bytes: int
    fetched_bytes: tuple[int, ...]  # from other ranks, in one forward
    largest_copy_bytes: int  # of the copies that make up a fetch
    kv_bytes_per_token: int
    engine_bytes_per_token: int
    tp: int
    seq: int
    backup_bytes: tuple[int, ...] = ()  # of ffn_bytes, copies of other ranks' units
    backup_host_bytes: int = 0  # host memory for a GPU's part of the copies

    def kv_bytes(self, rank: int) -> int:
        """What is left for KV cache; negative where the weights alone do not fit."""
        fixed = (
            self.other_bytes + self.ffn_bytes[rank] + self.ring_bytes[rank] + self.activation_bytes + self.reserve_bytes
        )
        return self.usable_bytes - fixed

    def kv_tokens(self, rank: int) -> int:
        """Tokens that replica `rank` can keep."""
        return max(0, self.kv_bytes(rank)) // (self.kv_bytes_per_token + self.engine_bytes_per_token)

    @property
    def tightest(self) -> int:
        """The rank with the least KV cache."""
        return min(range(len(self.ffn_bytes)), key=self.kv_bytes)

    @property
    def node_kv_tokens(self) -> int:
        return sum(self.kv_tokens(rank) for rank in range(len(self.ffn_bytes)))

    @property
    def batch(self) -> int:
        """Whole requests of `seq` tokens that the tightest replica holds at once."""
        return self.kv_tokens(self.tightest) // self.seq

    @property
    def fits(self) -> bool:
        return self.batch >= 1


def replicated(deployment: Deployment) -> MemoryPlan:
    """Every replica holds all weights."""
    placement = C.Placement("layer", deployment.layouts, 1)
    return MemoryPlan(
        kind="replicated",
        active=False,
        reason="",
        slots=(0,) * deployment.dp,
        usable_bytes=int(deployment.gpu.memory_bytes * deployment.utilization) // deployment.ranks_per_gpu,
        other_bytes=deployment.model.other_bytes(deployment.tp),
        ffn_bytes=(placement.arena_bytes(0),) * deployment.dp,
        ring_bytes=(0,) * deployment.dp,
        activation_bytes=deployment.activation_bytes(),
        reserve_bytes=deployment.reserve_bytes + deployment.engine_bytes(),
        fetched_bytes=(0,) * deployment.dp,
        largest_copy_bytes=0,
        kv_bytes_per_token=deployment.model.kv_bytes_per_token(deployment.tp),
        engine_bytes_per_token=deployment.engine_bytes_per_token(),
        tp=deployment.tp,
        seq=deployment.seq,
    )


def pooled(deployment: Deployment, kind: str, slots: int | None = None) -> MemoryPlan:
    """With a pool of that placement; `slots` None takes what the pool would choose.

    Raises ConfigError as the pool does: an unknown placement, more ranks than layers, slots that make no sense.
    """
    base, dp, layers = replicated(deployment), deployment.dp, deployment.model.layers
    if kind not in PLACEMENTS:
        raise ConfigError(f"placement must be one of {', '.join(PLACEMENTS)}, got {kind!r}")
    if dp == 1:
        return replace(base, kind=kind, reason="the group has one rank")
    if kind == "layer" and dp > layers:
        raise ConfigError(
            f"dp={dp} is more than the {layers} layers of {deployment.model.name}: with placement='layer' every rank "
            f"owns at least one; use a smaller dp or placement='striped'"
        )
    placement = C.Placement(kind, deployment.layouts, dp)
    local = [deployment.read_in_place(placement, kind, rank) for rank in range(dp)]
    backups = BackupPlan(placement, dp, layers, deployment.backup, on_device=True)
    copies = tuple(backups.kept_bytes(rank) for rank in range(dp))
    shares = tuple(placement.arena_bytes(rank) + copies[rank] for rank in range(dp))
    chosen, pays = choose_slots(placement, slots, True, local, shares)
    stride = -(-placement.largest_unit_bytes // C.slot_alignment) * C.slot_alignment
    rings = tuple(count * stride for count in chosen)
    if slots is None and not pays:
        reason = "pooling would free nothing: share and ring take as much as the weights"
        return replace(base, kind=kind, reason=reason)
    remote = [_remote_copies(placement, rank, here) for rank, here in enumerate(local)]
    return replace(
        base,
        kind=kind,
        active=True,
        slots=tuple(chosen),
        ffn_bytes=shares,
        ring_bytes=rings,
        backup_bytes=copies,
        backup_host_bytes=max(backups.host_bytes()),
        fetched_bytes=tuple(sum(sizes) for sizes in remote),
        largest_copy_bytes=max((size for sizes in remote for size in sizes), default=0),
    )


def _remote_copies(placement, rank: int, here: list[bool]) -> list[int]:
    """Bytes of each copy that other ranks' memory feeds in one forward of `rank`."""
    ops = (op for layer, local in enumerate(here) if not local for op in placement.copies(layer, rank))
    return [op.width * op.height for op in ops if op.owner != rank]

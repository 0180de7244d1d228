"""How long an iteration computes and how long its fetches take: from how many rows on fetches are hidden.

Rooflines: a part takes the longer of its arithmetic and its memory traffic, at attainable rates; the FFN's measured
times replace its roofline where the profile has them. Left out: TP's all-reduces (they lengthen an iteration, and share
the link with the fetches), launches, and the HBM traffic of the fetches themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..profile import FFNTimes, find_times
from .capacity import Deployment, MemoryPlan

_MOST_ROWS = 1 << 20


@dataclass(frozen=True)
class Timing:
    """Seconds of one iteration with `rows` requests on a replica, each with the average context in its KV cache.

    `compute`: with all weights here. `fetch`: bringing the remote FFN bytes once. `was`: the longer of both, fetches
    being asynchronous. `cas`: attention here, every FFN at its owner, in one batch with as many rows
    of every other replica.
    """

    rows: int
    compute: float
    fetch: float
    was: float
    cas: float

    @property
    def hidden(self) -> bool:
        return self.fetch <= self.compute

    @property
    def mode(self) -> str:
        return "cas" if self.cas < self.was else "was"


class Clock:
    """Times of one deployment; `plan` says what is fetched."""

    def __init__(self, deployment: Deployment, plan: MemoryPlan):
        self._d = deployment
        self._plan = plan
        kinds = deployment.model.by_kind(deployment.tp)
        self._attention = kinds["attention"]
        # Of the embeddings a row reads one line; the head's matrix is read whole, be it tied or not.
        self._head = -(-deployment.model.vocabulary // deployment.tp) * deployment.model.hidden
        self._ffn_sizes: dict[tuple[int, int, bool], int] = {}  # (hidden, inner, gated) -> layers
        for ffn in deployment.model.ffns:
            key = (ffn.hidden, ffn.inner // deployment.tp, ffn.gated)
            self._ffn_sizes[key] = self._ffn_sizes.get(key, 0) + 1

    @property
    def uses_measured_ffn(self) -> bool:
        return all(self._times_of(*size) for size in self._ffn_sizes)

    def _times_of(self, hidden: int, inner: int, gated: bool) -> FFNTimes | None:
        return find_times(self._d.gpu.ffn_times, hidden, inner, gated, self._d.model.dtype.itemsize)

    def ffn(self, rows: int) -> float:
        """All layers' FFNs over `rows` rows, seconds."""
        total = 0.0
        for (hidden, inner, gated), layers in self._ffn_sizes.items():
            times = self._times_of(hidden, inner, gated)
            weights = (3 if gated else 2) * hidden * inner
            total += layers * (times.at(rows) if times else self._gemm(weights, rows))
        return total

    def projections(self, rows: int) -> float:
        """Attention's projections of all layers over `rows` rows, seconds."""
        return self._gemm(self._attention, rows)

    def head(self, rows: int) -> float:
        """Logits of `rows` rows, seconds."""
        return self._gemm(self._head, rows)

    def rest(self, rows: int) -> float:
        """Attention's projections and the head over `rows` rows, seconds."""
        return self.projections(rows) + self.head(rows)

    def job(self, requests: int) -> Timing:
        """The mean iteration of a batch job that keeps `requests` running: each is followed by another when it ends, so
        that prompts come in at the rate at which answers go out."""
        answer = self._d.seq - self._d.prompt_tokens
        return self.at(requests, round(requests * self._d.prompt_tokens / answer))

    def at(self, requests: int, prompt_rows: int = 0) -> Timing:
        """`requests` that decode one token each, and `prompt_rows` of others' prompts in the same iteration."""
        d, size = self._d, self._d.model.dtype.itemsize
        rows = requests + prompt_rows
        cache = requests * d.context * self._plan.kv_bytes_per_token / d.gpu.hbm_bytes_per_s
        rest = cache + self.rest(rows)
        compute = rest + self.ffn(rows)
        fetch = max(self._plan.fetched_bytes) / d.gpu.link_bytes_per_s
        # to the owner and back; every GPU of a replica sends its rows to the owner of its own shard
        trip = d.gpu.round_trip_s + 2 * rows * d.model.hidden * size / d.gpu.link_bytes_per_s
        cas = rest + self.ffn(d.dp * rows) + d.model.layers * trip
        return Timing(requests, compute, fetch, max(compute, fetch), cas)

    def hidden_rows(self) -> int | None:
        """The fewest rows of a decode iteration that hide its fetches; None if no batch does."""
        return _first(lambda rows: self.at(rows).hidden)

    def was_rows(self) -> int | None:
        """The fewest rows at which WaS takes no longer than CaS."""
        return _first(lambda rows: self.at(rows).mode == "was")

    def prefill_rows(self) -> int | None:
        """The fewest prompt tokens in an iteration that hide its fetches by themselves."""
        return _first(lambda rows: self.at(0, rows).hidden)

    def fetch_of_a_layer(self) -> float:
        """Mean over the remote layers, seconds."""
        worst = max(range(self._d.dp), key=lambda rank: self._plan.fetched_bytes[rank])
        layers = self._d.model.layers
        if self._plan.kind == "layer":
            layers -= layers // self._d.dp
        return self._plan.fetched_bytes[worst] / self._d.gpu.link_bytes_per_s / max(1, layers)

    def _gemm(self, parameters: int, rows: int) -> float:
        gpu, size = self._d.gpu, self._d.model.dtype.itemsize
        # rates are those of 16-bit weights; float32 takes twice the time (TF32's rate)
        arithmetic = 2 * parameters * rows / gpu.flops_per_s * (size / 2)
        return max(arithmetic, parameters * size / gpu.hbm_bytes_per_s)


def _first(holds: Callable[[int], bool]) -> int | None:
    """The least rows for which `holds`, which stays true once it is."""
    high = 1
    while not holds(high):
        high *= 2
        if high > _MOST_ROWS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high

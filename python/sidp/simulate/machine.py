"""A GPU's rates as the simulator takes them: how long a rank computes, what its links carry, what its policy believes.

T(B) comes from the planner's clock: a profile's measured times where the GPU has them, else datasheet rooflines. What an engine
and a fabric add to that is assumed, in `Engine` and `Fabric`, the same for every experiment.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from .._native import C
from ..config import FFNSpec
from ..planner.capacity import Deployment, MemoryPlan
from ..planner.crossover import Clock
from ..policy import Profile, build_model

_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384)
# A CaS call on 40 of an H100's 132 SMs against cuBLAS on all of them (bench/RESULTS.md, the mean of three models). More than
# 128 rows are served in pieces of 128, each of which reads the weights again.
_SERVE_RATIO = ((1, 1.02), (16, 1.02), (32, 1.03), (64, 1.08), (128, 1.35))
_SERVED_AT_ONCE = 128
# An H100's FFN GEMMs over their roofline, by rows over the ridge's rows (H=5120, F=25600: 1 to 2048 rows, the ridge at 196).
MEASURED_GEMM = (
    (0.005, 1.20),
    (0.08, 1.25),
    (0.33, 1.27),
    (0.65, 1.35),
    (1.31, 1.17),
    (2.6, 0.95),
    (5.2, 0.94),
    (10.5, 1.0),
)


@dataclass(frozen=True)
class Engine:
    """What an iteration costs besides its arithmetic; assumptions, not measurements.

    Args:
        host_s: scheduling and sampling, an iteration.
        layer_s: launches and small kernels (norms, rotary, residuals), a layer.
        allreduce_s: latency of one all-reduce of a replica's GPUs; two a layer.
        stage_s: handing a batch to the next stage of a pipeline.
        attention: what attention takes over its roofline.
        gemm: what GEMMs take over their roofline, as MEASURED_GEMM; () leaves the roofline.
        jitter: each copy and each piece of computing takes 1 +- this of its time. Without any, ranks in step stay in step for ever, which
            no real group does (the CPU backend shows it).
    """

    host_s: float = 2e-3
    layer_s: float = 20e-6
    allreduce_s: float = 15e-6
    stage_s: float = 30e-6
    attention: float = 1.0
    gemm: tuple[tuple[float, float], ...] = ()
    jitter: float = 0.02


@dataclass(frozen=True)
class Fabric:
    """The links between ranks. None takes the GPU's own NVLink rate.

    Args:
        egress_gbps: what one owner gives to all of its readers together, GB/s.
        ingress_gbps: what one reader takes.
        incast: with n readers at once an owner's egress keeps 1 / (1 + incast * (n - 1)) of its rate. 0 is a fair fabric that
            loses nothing; no measurement of NVLink is known to us.
        turns: an owner feeds its readers one after another, each at the full rate, as sidp has it on GPUs from three ranks on.
        round_trip_s: of a CaS request besides bytes and computing; None takes the GPU's.
        copy_bytes: what issuing a copy costs, as bytes at the full rate: 4 MB reach 70 % of it, 16 MB 90 %.
        local_gbps: a rank's own extent into its slot (one H100).
    """

    egress_gbps: float | None = None
    ingress_gbps: float | None = None
    incast: float = 0.0
    turns: bool = False
    round_trip_s: float | None = None
    copy_bytes: float = 1.7e6
    local_gbps: float = 1481.0

    def native(self, deployment: Deployment, striped: bool):
        gpu, model = deployment.gpu, deployment.model
        made = C.SimFabric()
        made.egress_bytes_per_s = self.egress_gbps * 1e9 if self.egress_gbps else gpu.link_bytes_per_s
        made.ingress_bytes_per_s = self.ingress_gbps * 1e9 if self.ingress_gbps else gpu.link_bytes_per_s
        made.local_bytes_per_s = self.local_gbps * 1e9
        made.copy_bytes, made.incast, made.turns = self.copy_bytes, self.incast, self.turns
        made.round_trip_s = gpu.round_trip_s if self.round_trip_s is None else self.round_trip_s
        made.send_row_bytes = model.hidden * model.dtype.itemsize
        made.reply_row_bytes = model.hidden * (4 if striped else model.dtype.itemsize)
        return made


class Rates:
    """Times of one deployment's rank, in seconds."""

    def __init__(self, deployment: Deployment, plan: MemoryPlan, engine: Engine):
        self._d, self._engine = deployment, engine
        self._clock = Clock(deployment, plan)
        self._layers = deployment.model.layers
        gpu = deployment.gpu
        self._ridge = deployment.model.dtype.itemsize * gpu.flops_per_s / (2 * gpu.hbm_bytes_per_s)  # rows

    def _gemm(self, rows: int) -> float:
        """Over the roofline."""
        return _between(self._engine.gemm, rows / self._ridge) if self._engine.gemm else 1.0

    def ffn(self, rows: int) -> float:
        """One layer's FFN."""
        return self._clock.ffn(rows) / self._layers * self._gemm(rows)

    def serve(self, rows: int) -> float:
        """One layer's FFN by a CaS server."""
        if rows > _SERVED_AT_ONCE:
            return self.serve(_SERVED_AT_ONCE) * rows / _SERVED_AT_ONCE
        return self.ffn(rows) * _between(_SERVE_RATIO, rows)

    def rest(self, rows: int) -> float:
        """A layer's projections, its all-reduces and its launches."""
        d = self._d
        seconds = self._clock.projections(rows) / self._layers * self._gemm(rows)
        seconds += self._engine.layer_s
        if d.tp == 1:
            return seconds
        nbytes = 2 * (d.tp - 1) / d.tp * rows * d.model.hidden * d.model.dtype.itemsize
        return seconds + 2 * (self._engine.allreduce_s + nbytes / d.gpu.link_bytes_per_s)

    def once(self, rows: int, stages: int = 1) -> float:
        return self._engine.host_s + self._clock.head(rows) + (stages - 1) * self._engine.stage_s

    def iteration(self, requests: int) -> float:
        """Decoding `requests` sequences of the deployment's mean context, all weights here."""
        cached = requests * self._d.context * self.native().cached_token_s
        return self._layers * (self.rest(requests) + self.ffn(requests)) + self.once(requests) + cached

    def native(self, stages: int = 1):
        d = self._d
        made = C.SimCompute()
        made.ffn = C.TimeTable([(n, self.ffn(n)) for n in _ROWS])
        made.serve = C.TimeTable([(n, self.serve(n)) for n in _ROWS])
        made.rest = C.TimeTable([(n, self.rest(n)) for n in _ROWS])
        made.once = C.TimeTable([(n, self.once(n, stages)) for n in _ROWS])
        attention = self._engine.attention
        made.cached_token_s = attention * d.model.kv_bytes_per_token(d.tp) / d.gpu.hbm_bytes_per_s
        heads = d.model.layers * d.model.heads * d.model.head_dim / d.tp
        made.pair_s = (
            attention * 4 * heads / d.gpu.flops_per_s
        )  # a multiplication and an addition, for scores and for values
        return made


def _between(points, x: float) -> float:
    """Straight lines between ascending points, level beyond the first and the last."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * max(0.0, (x - x0) / (x1 - x0))
    return points[-1][1]


def policies(deployment: Deployment, placement, slots, fabric, rates: Rates) -> list:
    """The native PolicyModel of every rank, as a pool of that placement makes them from a profile."""
    model, tp = deployment.model, deployment.tp
    units = [
        FFNSpec(ffn.hidden, ffn.inner // tp, gated=ffn.gated, bias=ffn.bias, dtype=model.dtype).unit()
        for ffn in model.ffns
    ]
    link = min(fabric.ingress_bytes_per_s, fabric.egress_bytes_per_s)
    profile = Profile(link / 1e9, tuple((n, rates.ffn(n)) for n in _ROWS), fabric.round_trip_s)
    parts = deployment.dp if placement.owner(0) < 0 else 1
    made = [build_model(units, placement, rank, slots[rank], profile, parts) for rank in range(deployment.dp)]
    for policy in made:
        policy.served = C.TimeTable([(n, rates.serve(n) / parts) for n in _ROWS])
    return made

"""mode="auto" on GPUs: rates measured at commit, iterations timed by events now and then, never a synchronisation.

The host only enqueues, so the policy does not go by the clock of its calls. A captured graph keeps the mode it was captured
with: capture one for each size of batch, as engines do. It takes CaS only where kernels are loaded at the start
(CUDA_MODULE_LOADING=EAGER): nobody makes sure of a server before a replay asks, and one that is launched then may have to wait,
behind a kernel that is being loaded, for that very replay.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch

from ._native import C
from .ffn import apply_formula
from .policy import Chooser, Profile, build_model

_COMPUTE_ROWS = (1, 16, 64, 128, 256, 512, 1024, 2048)
_SERVED_ROWS = (1, 8, 32, 64, 128)
_REPEATS = 5
_HEAD_START_CYCLES = 5_000_000  # some 3 ms
_ROUND_TRIP_S = 3e-6  # between two GPUs, beyond what a request to one's own server takes
_LINK_BYTES = 128 << 20
_SAMPLE_EVERY = 16  # iterations
_LAZY = 2  # CU_MODULE_LAZY_LOADING
_SETTLED = 2  # iterations after a switch that are not timed: the ring is cold, the servers asleep


def loads_lazily() -> bool:
    """Whether CUDA loads a kernel at its first use. The driver is asked: what it found at its start counts, not the environment."""
    mode = ctypes.c_int(_LAZY)
    failed = ctypes.CDLL("libcuda.so.1").cuModuleGetLoadingMode(ctypes.byref(mode))
    return bool(failed) or mode.value == _LAZY


def _seconds(run: Callable[[], object]) -> float:
    """Median time on the device, after one run that is not counted.

    The device sleeps until all runs are enqueued: a small FFN would be timed by what the host takes to launch it.
    """
    run()
    torch.cuda._sleep(_HEAD_START_CYCLES)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_REPEATS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    marks[-1].synchronize()
    times = sorted(before.elapsed_time(after) for before, after in pairwise(marks))
    return max(times[len(times) // 2] * 1e-3, 1e-9)


def _served_layer(client) -> int | None:
    return next((layer for layer, here in enumerate(client.slices) if here.inner), None)


def measure_compute(client, units) -> tuple[tuple[float, float], ...]:
    """(rows, seconds) of one whole layer, measured on what this rank holds of one."""
    layer = _served_layer(client)
    if layer is None:
        return ((1.0, 1e-6), (64.0, 1e-6))  # corrected by what iterations take
    here, spec, weights = client.slices[layer], units[layer].formula, client.weights_here(layer)
    x = torch.randn(_COMPUTE_ROWS[-1], here.hidden, device=client.device, dtype=here.dtype)
    whole = spec.intermediate_size / here.inner
    return tuple((float(n), whole * _seconds(partial(apply_formula, x[:n], weights, spec))) for n in _COMPUTE_ROWS)


def measure_served(client) -> list[tuple[float, float]]:
    """(rows, seconds) of a request that this rank's own server answers; empty where it serves nothing."""
    layer = _served_layer(client)
    if layer is None:
        return []
    here = client.slices[layer]
    x = torch.randn(_SERVED_ROWS[-1], here.hidden, device=client.device, dtype=here.dtype)
    return [(float(n), _seconds(partial(client.forward_here, layer, x[:n]))) for n in _SERVED_ROWS]


def measure_link(plan, transport) -> float:
    """GB/s at which this rank copies from the next one."""
    owner = (plan.rank + 1) % plan.world_size
    nbytes = min(_LINK_BYTES, plan.placement.arena_bytes(owner))
    return C.cuda_copy_rate(transport.source(owner), nbytes, plan.device.index) / 1e9 if nbytes else 0.0


def start(plan, client, transport) -> CudaPolicy:
    """The policy of a pool that is being committed: from SIDP_PROFILE, or measured here and now."""
    path = os.environ.get("SIDP_PROFILE")
    with torch.cuda.device(plan.device), torch.no_grad():
        if path:
            profile = Profile.load(path, plan.units)
        else:
            profile = Profile(measure_link(plan, transport), measure_compute(client, plan.units), _ROUND_TRIP_S)
        parts = plan.world_size if plan.striped else 1
        model = build_model(plan.units, plan.placement, plan.rank, plan.slots, profile, parts)
        served = measure_served(client)
        if served:
            model.served = C.TimeTable(served)
    return CudaPolicy(model, client.requester_stats)


class _Sample:
    """Events around the FFN calls of one iteration."""

    def __init__(self, cas: bool, rows: int):
        self.cas, self.rows = cas, rows
        self.marks: list[torch.cuda.Event] = []  # before and after each call

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    @property
    def arrived(self) -> bool:
        return self.marks[-1].query()

    def seconds(self) -> tuple[float, float]:
        """Of the iteration, and of its FFN calls."""
        inside = sum(a.elapsed_time(b) for a, b in zip(self.marks[::2], self.marks[1::2], strict=True))
        return self.marks[0].elapsed_time(self.marks[-1]) * 1e-3, inside * 1e-3


class CudaPolicy(Chooser):
    """One rank's choice; nothing of it is collective and nothing waits for the device."""

    def __init__(self, model, requester_stats: Callable[[], object]):
        super().__init__(C.ModePolicy(model, timed=False))
        self._layers = model.layers
        self._requester_stats = requester_stats
        self._rows = self._fused = 0
        self._last_layer, self._iterations, self._since_switch = -1, 0, 0
        self._cas = False
        self.captures_cas = not loads_lazily()
        self._captured: bool | None = None  # the choice of the graph that is being captured
        self._running: _Sample | None = None
        self._waiting: _Sample | None = None

    def enter(self, layer: int, rows: int) -> bool:
        """Before an FFN call: whether its iteration runs by CaS."""
        begins, self._last_layer = layer <= self._last_layer or self._last_layer < 0, layer
        if torch.cuda.is_current_stream_capturing():
            if begins or self._captured is None:
                self._captured = self.captures_cas and self._policy.best_is_cas(float(rows))
            return self._captured
        begins, self._captured = begins or self._captured is not None, None
        cas = self._policy.enter(layer, float(rows), 0.0)
        if begins:
            self._begin_iteration(cas, rows)
        if self._running is not None:
            self._running.mark()
        return cas

    def leave(self) -> None:
        if self._running is not None and self._captured is None:
            self._running.mark()

    def _begin_iteration(self, cas: bool, rows: int) -> None:
        if self._running is not None and len(self._running.marks) == 2 * self._layers:
            self._waiting = self._running
        self._running = None
        self._since_switch = self._since_switch + 1 if cas is self._cas else 0
        self._cas = cas
        self._iterations += 1
        if self._waiting is not None and self._waiting.arrived:
            self._learn(self._waiting)
            self._waiting = None
        if self._waiting is None and self._since_switch >= _SETTLED and self._iterations % _SAMPLE_EVERY == 0:
            self._running = _Sample(cas, rows)

    def _learn(self, sample: _Sample) -> None:
        took, inside = sample.seconds()
        self._policy.learn(sample.cas, float(sample.rows), took, inside)
        seen = self._requester_stats()
        if seen.rows > self._rows:
            self._policy.set_fused_factor((seen.fused_rows - self._fused) / (seen.rows - self._rows))
        self._rows, self._fused = seen.rows, seen.fused_rows

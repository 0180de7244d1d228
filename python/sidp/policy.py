"""mode="auto": each rank picks WaS or CaS by itself, per iteration, from measured rates.

On the CPU "auto" stays with WaS, which is bit-identical, unless there is a reason to think that the link is the
bottleneck: a cap on it (SIDP_CPU_LINK_GBPS, SIDP_CPU_OWNER_GBPS) or a profile (SIDP_PROFILE=<file of sidp bench
--profile>, docs/profile.md).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ._native import C
from .cas import roles
from .config import Unit
from .errors import ConfigError
from .profile import MachineProfile, find_times

_CALIBRATION_ROWS = (1, 4, 16, 64)
_CALIBRATION_S = 1.0  # larger row counts are left out once this is spent
_CALIBRATION_RUNS = 10
_ROUND_TRIP_S = 150e-6  # of a request between two processes that may both have to be woken
_LINK_EVERY = 16  # iterations between two looks at the ring's own rate


@dataclass(frozen=True)
class Profile:
    """Measured rates of one machine and one FFN shape.

    Args:
        link_gbps: what one rank can fetch, GB/s (1e9 bytes); 0 where nothing limits it.
        compute: (rows, seconds) of one layer's FFN, ascending in rows.
        round_trip_s: of a CaS request besides its computing.
    """

    link_gbps: float
    compute: tuple[tuple[float, float], ...]
    round_trip_s: float = _ROUND_TRIP_S

    def __post_init__(self):
        object.__setattr__(self, "compute", tuple((float(rows), float(s)) for rows, s in self.compute))
        for name in ("link_gbps", "round_trip_s"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise ConfigError(f"profile: {name} must be a number of 0 or more, got {value!r}")

    @classmethod
    def load(cls, path: str | os.PathLike, units: Sequence[Unit]) -> Profile:
        """From a machine's profile (docs/profile.md), what it says of the first of ``units`` that has a formula.

        Raises:
            ConfigError: the file is missing or no profile, or has no times of that FFN.
        """
        machine = MachineProfile.load(path)
        spec = next((unit.formula for unit in units if unit.formula is not None), None)
        if spec is None:
            raise ConfigError(f"profile {path}: no layer of this pool has a formula, so that no times of it apply")
        shape = (spec.hidden_size, spec.intermediate_size, spec.gated, spec.dtype.itemsize)
        times = find_times(machine.ffn_times, *shape)
        if times is None:
            raise ConfigError(
                f"profile {path} has no ffn_times for hidden_size={spec.hidden_size}, intermediate_size="
                f"{spec.intermediate_size}, gated={spec.gated}, {spec.dtype}: measure them with sidp bench --profile {path} "
                f"--hidden {spec.hidden_size} --inner {spec.intermediate_size}"
            )
        trip = _ROUND_TRIP_S if machine.round_trip_s is None else machine.round_trip_s
        return cls(machine.link_bytes_per_s / 1e9, tuple(zip(times.rows, times.seconds, strict=True)), trip)


def cap_bytes_per_s() -> float:
    """The tighter of the caps SIDP_CPU_LINK_GBPS and SIDP_CPU_OWNER_GBPS; 0 where there is none."""
    from .transport import rate_from_environment

    rates = [rate_from_environment(name) for name in ("SIDP_CPU_LINK_GBPS", "SIDP_CPU_OWNER_GBPS")]
    return min((rate for rate in rates if rate > 0), default=0.0)


def auto_may_use_cas(units: Sequence[Unit]) -> bool:
    """Whether mode="auto" has a reason to consider CaS here; see the module's head."""
    if not any(roles(unit) is not None for unit in units):
        return False
    return bool(os.environ.get("SIDP_PROFILE")) or cap_bytes_per_s() > 0


def calibrate(run: Callable[[int], None], scale: float = 1.0) -> tuple[tuple[float, float], ...]:
    """(rows, seconds) of ``run(rows)``, each time multiplied by ``scale``: the best of a few runs after a warm one."""
    begin, points = time.perf_counter(), []
    for rows in _CALIBRATION_ROWS:
        if points and time.perf_counter() - begin > _CALIBRATION_S:
            break
        run(rows)
        took: list[float] = []
        while len(took) < 2 or (len(took) < _CALIBRATION_RUNS and sum(took) < _CALIBRATION_S / 10):
            start = time.perf_counter()
            run(rows)
            took.append(time.perf_counter() - start)
        points.append((float(rows), max(1e-9, min(took) * scale)))
    return tuple(points)


def measure_compute(slices: Sequence, units: Sequence[Unit], blas) -> tuple[tuple[float, float], ...]:
    """Times of one whole layer on this machine, measured on what this rank holds of one."""
    for piece, unit in zip(slices, units, strict=True):
        if piece.inner == 0:
            continue
        hidden, whole = unit.formula.hidden_size, unit.formula.intermediate_size
        x = torch.zeros(max(_CALIBRATION_ROWS), hidden)
        y = torch.empty_like(x)
        return calibrate(
            lambda rows, piece=piece, x=x, y=y: C.run_slice(piece, blas, x.data_ptr(), rows, y.data_ptr()),
            whole / piece.inner,
        )
    return ((1.0, 1e-6), (64.0, 1e-6))  # this rank serves nothing: corrected by what iterations take


def build_model(units: Sequence[Unit], placement, rank: int, slots: int, profile: Profile, parts: int):
    """The native PolicyModel of one rank. ``parts``: owners that share a layer's computing (D in striped, else 1)."""
    remote = [layer for layer in range(len(units)) if not placement.local(layer, rank)]
    model = C.PolicyModel()
    model.layers, model.remote_layers = len(units), len(remote)
    fetched = sum(op.width * op.height for layer in remote for op in placement.copies(layer, rank) if op.owner != rank)
    model.fetch_bytes = float(fetched) if len(remote) > slots else 0.0  # what fits in the ring is fetched once
    model.link_bytes_per_s = profile.link_gbps * 1e9
    model.round_trip_s = profile.round_trip_s
    spec = next(unit.formula for unit in units if unit.formula is not None)
    travelling = spec.dtype.itemsize * 2 if parts == 1 else (parts - 1) * (spec.dtype.itemsize + 4)
    model.row_bytes = float(spec.hidden_size * travelling)
    model.owner_share = 1 / parts
    # Until the first answers tell: the others do as this rank does, and where every owner serves every request it has all of theirs.
    model.fused_factor = float(parts)
    model.compute = C.TimeTable(list(profile.compute))
    return model


def crossover_rows(model, outside_s: float = 0.0, limit: int = 65536) -> int | None:
    """The fewest rows an iteration needs for WaS to be at least as fast as CaS; None where ``limit`` rows do not do.

    Args:
        model: a native PolicyModel (``build_model``). outside_s: seconds of an iteration outside the FFNs.
    """
    rows = C.crossover_rows(model, outside_s, limit)
    return None if rows > limit else rows


def start(plan, ring, client, blas) -> AutoPolicy:
    """The policy of a pool that is being committed: from SIDP_PROFILE, or measured here and now."""
    parts = plan.world_size if plan.striped else 1
    path = os.environ.get("SIDP_PROFILE")
    if path:
        profile = Profile.load(path, plan.units)
    else:
        profile = Profile(cap_bytes_per_s() / 1e9, measure_compute(client.slices, plan.units, blas))
    model = build_model(plan.units, plan.placement, plan.rank, plan.slots, profile, parts)
    return AutoPolicy(model, ring, client.requester_stats)


class Chooser:
    """One rank's choice over a native ModePolicy, and why; what both backends share.

    Attributes:
        captures_cas: whether a CUDA graph may take CaS.
    """

    captures_cas = False

    def __init__(self, policy):
        self._policy = policy

    @property
    def model(self):
        """The native PolicyModel that predictions come from."""
        return self._policy.model

    def pin(self, mode: str | None) -> None:
        """Holds the mode, "was" or "cas", from the next iteration on; None lets the policy choose again."""
        self._policy.pin(mode or "")

    def best(self, rows: int) -> str:
        """The mode that is expected to be faster, without hysteresis: "was" or "cas"."""
        return "cas" if self._policy.best_is_cas(float(rows)) else "was"

    def expected(self, rows: int) -> tuple[float, float, float]:
        """What the model says of an iteration, in seconds: its fetches in WaS, its FFNs in WaS, in CaS."""
        return C.predict(self.model, float(rows))

    @property
    def reason(self) -> str:
        return self._policy.reason

    @property
    def decisions(self) -> list[str]:
        """The newest decisions, oldest first, each with its run of iterations."""
        return [f"iterations {run.first}-{run.last}: {run.text}" for run in self._policy.decisions]

    @property
    def switches(self) -> int:
        return self._policy.switches


class AutoPolicy(Chooser):
    """One rank's choice, fed by its own calls; nothing of it is collective."""

    def __init__(self, model, ring, requester_stats: Callable[[], object]):
        super().__init__(C.ModePolicy(model))
        self._ring, self._requester_stats = ring, requester_stats
        self._cas = False
        self._looked_at = 0
        self._rows = self._fused = 0

    def enter(self, layer: int, rows: int) -> bool:
        """Before an FFN call: whether its iteration runs by CaS. Pauses and wakes the ring where that changes."""
        cas = self._policy.enter(layer, float(rows), time.perf_counter())
        if cas is not self._cas:
            self._cas = cas
            self._ring.pause() if cas else self._ring.resume()
        if layer == 0:
            self._look()
        return cas

    def leave(self) -> None:
        self._policy.leave(time.perf_counter())

    def _look(self) -> None:
        """Now and then: the link as the ring sees it, and how many rows the owners fuse with ours."""
        self._looked_at += 1
        if self._looked_at % _LINK_EVERY:
            return
        ring = self._ring.stats()
        if ring.fetch_seconds > 0.01:
            self._policy.set_link(ring.fetched_bytes / ring.fetch_seconds)
        seen = self._requester_stats()
        if seen.rows > self._rows:
            self._policy.set_fused_factor((seen.fused_rows - self._fused) / (seen.rows - self._rows))
        self._rows, self._fused = seen.rows, seen.fused_rows

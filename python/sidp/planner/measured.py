"""Where WaS becomes faster than CaS on this machine: what the policy predicts, and both modes really run.

One rank has rows, the others are idle and serve: the tail of a batch job, for which CaS is there.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..config import FFNSpec, PoolConfig
from ..errors import ConfigError, SidpError
from ..launch import RankContext, launch

_SLOTS = 2  # fewer than the remote layers, or WaS would fetch once and never again
ROWS = (1, 4, 16, 32, 64, 96, 128, 192, 256, 384, 512)
_WARM, _LEAST, _MOST = 2, 3, 15  # iterations of one mode at one number of rows
_SECONDS = 1.5  # after which no further iteration of them begins
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Point:
    """Seconds of an iteration of ``rows`` rows, measured and (``*_expected``) as the policy's model has it."""

    rows: int
    was: float
    cas: float
    was_expected: float
    cas_expected: float


@dataclass(frozen=True)
class Crossover:
    """``predicted`` is the fewest rows for which the model has WaS at least as fast, None where it never is; ``measured``
    lies where the measured times meet, None where they do not within the points."""

    device: str
    points: tuple[Point, ...]
    predicted: int | None
    measured: float | None


def measure(
    spec: FFNSpec,
    layers: int,
    ranks: int,
    placement: str = "layer",
    rows: Sequence[int] = ROWS,
    link_gbps: float | None = None,
) -> Crossover:
    """Runs ``ranks`` processes over ``layers`` layers of ``spec``.

    Args:
        rows: of an iteration, ascending.
        link_gbps: cap on what one rank takes in, GB/s, which stands for a link on the CPU; None leaves it as it is.

    Raises:
        ConfigError: no choice between the modes here. RankFailed: a rank failed.
    """
    if list(rows) != sorted(set(rows)) or not rows or rows[0] < 1:
        raise ConfigError(f"rows must be numbers of 1 or more in ascending order, got {list(rows)}")
    remote = layers if placement == "striped" else layers - -(-layers // ranks)
    if ranks < 2 or remote <= _SLOTS:
        raise ConfigError(
            f"with {ranks} ranks and {layers} layers a rank reaches {remote} remotely: take 2 ranks or more, and so many layers "
            f"that at least {_SLOTS + 1} are remote"
        )
    device, points, predicted = launch(
        _rank, ranks, (spec, layers, placement, tuple(rows), link_gbps), timeout_s=_TIMEOUT_S
    )[0]
    return Crossover(device, points, predicted, crossing(points))


def crossing(points: Sequence[Point]) -> float | None:
    """The rows from which WaS is no slower than CaS: on the line between the first two points where that changes.

    Beyond it both compute all the time and take nearly the same, so that later changes of order mean little.
    """
    if points and points[0].was <= points[0].cas:
        return float(points[0].rows)
    for before, after in pairwise(points):
        low, high = before.was - before.cas, after.was - after.cas
        if low > 0 >= high:
            return before.rows + (after.rows - before.rows) * low / (low - high)
    return None


def _rank(context: RankContext, spec: FFNSpec, layers: int, placement: str, rows: tuple[int, ...], link_gbps):
    import torch

    from ..policy import crossover_rows
    from ..pool import WeightPool

    if link_gbps is not None:
        os.environ["SIDP_CPU_LINK_GBPS"] = str(link_gbps)
    torch.set_num_threads(context.threads)
    config = PoolConfig(mode="auto", placement=placement, slots=_SLOTS, timeout_s=60)
    with torch.inference_mode(), WeightPool([spec] * layers, config=config) as pool:
        generator = torch.Generator().manual_seed(context.rank)
        for layer in range(layers):
            if pool.owns(layer):
                shapes = {tensor.name: tensor.shape for tensor in spec.unit().tensors}
                made = {
                    n: (torch.randn(s, generator=generator) * s[-1] ** -0.5).to(spec.dtype) for n, s in shapes.items()
                }
                pool.load(layer, made)
        pool.commit()
        if pool.chooser is None:
            raise ConfigError(f"there is nothing to choose on {pool.device}: CaS is not offered here")
        model = pool.chooser.model
        if context.rank > 0:
            return None  # close() serves until rank 0 has closed
        points = tuple(_point(pool, spec, layers, count, model) for count in rows)
        return str(pool.device), points, crossover_rows(model)


def _point(pool, spec: FFNSpec, layers: int, rows: int, model) -> Point:
    import torch

    from .._native import C

    x = torch.randn(rows, spec.hidden_size).to(spec.dtype).to(pool.device)
    took = {mode: _seconds(pool, x, layers, mode) for mode in ("was", "cas")}
    _, was, cas = C.predict(model, float(rows))
    return Point(rows, took["was"], took["cas"], was, cas)


def _seconds(pool, x, layers: int, mode: str) -> float:
    """Median of an iteration in ``mode``, from the start to the device's end."""
    import torch

    from ..ffn import ffn_forward

    pool.chooser.pin(mode)
    before = pool.stats().calls
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < _WARM + _LEAST or (len(taken) < _MOST and time.perf_counter() - begin < _SECONDS):
        start = time.perf_counter()
        for layer in range(layers):
            ffn_forward(x, pool, layer)
        if x.is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    calls = pool.stats().calls
    other = "cas" if mode == "was" else "was"
    if calls[mode] == before[mode] or calls[other] != before[other]:
        raise SidpError(f"iterations pinned to '{mode}' made calls {calls}, after {before}: nothing was measured")
    return statistics.median(taken[_WARM:])


def print_crossover(found: Crossover, heading: str) -> None:
    """A table on standard output."""
    print(f"{heading}, on {found.device}; milliseconds of an iteration")
    print(f"{'rows':>6} {'WaS':>9} {'CaS':>9} {'WaS, predicted':>15} {'CaS, predicted':>15}")
    for p in found.points:
        times = (p.was, p.cas, p.was_expected, p.cas_expected)
        print(f"{p.rows:>6} " + " ".join(f"{t * 1e3:>{w}.2f}" for t, w in zip(times, (9, 9, 15, 15), strict=True)))
    last = found.points[-1].rows
    predicted = "no number of rows" if found.predicted is None else f"{found.predicted} rows"
    measured = f"beyond {last} rows, or nowhere" if found.measured is None else f"{found.measured:.0f} rows"
    print(f"WaS is at least as fast as CaS from: {predicted} (predicted), {measured} (measured)")

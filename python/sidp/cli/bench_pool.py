"""Pools as `sidp bench` measures them: opening, fetching, overlap and host time of real ranks, and T(rows) of one FFN."""

from __future__ import annotations

import os
import statistics
import time

import torch

from .. import FFNSpec, PoolConfig, WeightPool
from ..errors import ConfigError, SidpError
from ..ffn import apply_formula
from ..launch import RankFailed, launch
from ..profile import FFNTimes, MachineProfile
from .bench_copies import waived

_LAYERS = 6
_ROWS = {"cuda": (1, 16, 64, 128, 256, 512, 1024, 2048, 4096), "cpu": (1, 4, 16, 64)}
_POOL_S = 180.0
_LINK = "fetches of a pool"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"


def _spec(device_type: str, hidden: int, inner: int) -> FFNSpec:
    return FFNSpec(hidden, inner, dtype=torch.bfloat16 if device_type == "cuda" else torch.float32)


def _weights(spec: FFNSpec, device, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return {
        t.name: (torch.randn(t.shape, generator=generator, device=device) * t.shape[-1] ** -0.5).to(t.dtype)
        for t in spec.unit().tensors
    }


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(device: torch.device, run, rounds: int) -> float:
    """Median by the wall clock, the device's work included; the first round is not counted."""
    times = []
    for _ in range(rounds + 1):
        _sync(device)
        begin = time.perf_counter()
        run()
        _sync(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


# ---- ranks ----------------------------------------------------------------------------------------------------------------


def _rank(context, device_type: str, hidden: int, inner: int, rounds: int, own_gpus: bool, handles: str) -> dict:
    os.environ["SIDP_P2P"] = handles
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", context.rank if own_gpus else 0)
        torch.cuda.set_device(device)
    spec = _spec(device_type, hidden, inner)
    begin = time.perf_counter()
    config = PoolConfig(mode="was", slots=2, device=str(device), force_fetch=True, timeout_s=60)
    pool = WeightPool([spec] * _LAYERS, config=config)
    opened = time.perf_counter() - begin
    for layer in range(_LAYERS):
        if pool.owns(layer):
            pool.load(layer, _weights(spec, device, layer))
    pool.commit()
    remote = [layer for layer in range(_LAYERS) if not pool.placement.local(layer, pool.rank)]
    expected = _weights(spec, device, remote[0])
    right = all(torch.equal(tensor, expected[name]) for name, tensor in pool.acquire(remote[0]).items())
    pool.release(remote[0])
    if not right:
        raise SidpError(f"layer {remote[0]} did not arrive as it was loaded")
    import torch.distributed as dist

    dist.barrier()
    found = _measure(pool, spec, device, remote, rounds)
    dist.barrier()
    pool.close()
    return {"open_ms": opened * 1e3, **found}


def _measure(pool, spec: FFNSpec, device: torch.device, remote: list[int], rounds: int) -> dict:
    """Milliseconds of the remote layers: fetched only, computed only, both; host time of a pair that need not wait."""

    def fetch():
        for layer in remote:
            pool.acquire(layer)
            pool.release(layer)

    before = pool.stats().fetched_bytes
    link_s = _seconds(device, fetch, rounds)
    nbytes = (pool.stats().fetched_bytes - before) / (rounds + 1)
    here = _weights(spec, device)
    one = torch.randn(1, spec.hidden_size, device=device).to(spec.dtype)
    once = _seconds(device, lambda: apply_formula(one, here, spec), rounds)
    rows = max(1, min(16384, int(link_s / len(remote) / max(once, 1e-6))))  # so that both take about as long
    x = torch.randn(rows, spec.hidden_size, device=device).to(spec.dtype)

    def compute():
        for _ in remote:
            apply_formula(x, here, spec)

    def both():
        for layer in remote:
            weights = pool.acquire(layer)
            apply_formula(x, weights, spec)
            pool.release(layer)

    compute_s, both_s = _seconds(device, compute, rounds), _seconds(device, both, rounds)
    return {
        "gb_s": nbytes / link_s / 1e9,
        "link_ms": link_s * 1e3,
        "compute_ms": compute_s * 1e3,
        "pooled_ms": both_s * 1e3,
        "ratio": both_s / max(compute_s, link_s),
        "host_us": _host_us(pool, remote[0], device, rounds),
    }


def _host_us(pool, layer: int, device: torch.device, rounds: int) -> float:
    """Host time of acquire and release where the layer is held already, so that there is nothing to wait for."""
    pool.acquire(layer)
    _sync(device)
    times = []
    for _ in range(50 * rounds):
        begin = time.perf_counter()
        pool.acquire(layer)
        pool.release(layer)
        times.append(time.perf_counter() - begin)
    pool.release(layer)
    return statistics.median(times) * 1e6


def pools(device: torch.device, hidden: int, inner: int, rounds: int) -> list[dict]:
    """Two ranks over each way to reach one another's memory."""
    from ..transport_cuda import HANDLES

    kinds = (*HANDLES, "host") if device.type == "cuda" else ("host",)
    own_gpus = device.type == "cuda" and torch.cuda.device_count() >= 2
    found = []
    for kind in kinds:
        name = f"{_LINK}, {kind}" if device.type == "cuda" else _LINK
        arguments = (device.type, hidden, inner, rounds, own_gpus, kind)
        try:
            ranks = launch(_rank, 2, arguments, timeout_s=_POOL_S)
        except RankFailed as error:
            if device.type != "cuda" or kind == "host":
                raise
            found.append(waived(name, error.reason))
            continue
        slowest = max(ranks, key=lambda figures: figures["link_ms"])
        if device.type == "cuda" and not own_gpus and kind != "host":
            found.append(
                {"what": f"opening a pool, {kind}", "open_ms": slowest["open_ms"], "host_us": slowest["host_us"]}
            )
            found.append(waived(name, "both ranks are on one GPU: a copy inside it says nothing about a link"))
            continue
        found.append({"what": name, **slowest, "verified": True})
    found.append(waived("round trip of a flag", "bench/flag_round_trip.cu measures it"))
    return found


# ---- the profile ----------------------------------------------------------------------------------------------------------


def ffn_times(device: torch.device, hidden: int, inner: int, rounds: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Rows, and seconds of one FFN of the formula on them. Repeats run in a row, so that launching is hidden."""
    spec = _spec(device.type, hidden, inner)
    weights, rows, repeats = _weights(spec, device), _ROWS[device.type], 10 if device.type == "cuda" else 1
    seconds = []
    for n in rows:
        x = torch.randn(n, hidden, device=device).to(spec.dtype)

        def run(x=x):
            for _ in range(repeats):
                apply_formula(x, weights, spec)

        seconds.append(_seconds(device, run, rounds) / repeats)
    return rows, tuple(seconds)


def profile_of(
    device: torch.device, results: list[dict], times, hidden: int, inner: int, rounds: int
) -> MachineProfile:
    """Raises ConfigError where no link was measured."""
    rate = _link_rate(results)
    spec = _spec(device.type, hidden, inner)
    measured = (FFNTimes(hidden, inner, spec.gated, *times, spec.dtype),)
    if device.type != "cuda":
        return MachineProfile(device_name(device), rate * 1e9, ffn_times=measured)
    n = 8192
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    seconds = _seconds(device, lambda: [a @ b for _ in range(10)], rounds) / 10
    inside = next(r["gb_s"] for r in results if r["what"].startswith("device to itself"))
    memory = torch.cuda.get_device_properties(device).total_memory
    return MachineProfile(device_name(device), rate * 1e9, memory, inside * 1e9, 2 * n**3 / seconds, ffn_times=measured)


def _link_rate(results: list[dict]) -> float:
    """GB/s: of a pool's own fetches between two ranks that have a link, else of pinned host memory."""
    fetches = [r["gb_s"] for r in results if r["what"].startswith(_LINK) and "gb_s" in r]
    if not fetches:
        raise ConfigError("no link was measured: see what was waived")
    return max(fetches)

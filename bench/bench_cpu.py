"""What the pool costs and hides on the CPU backend. Run: python -m pytest bench/bench_cpu.py

Each test prints its ratio in `extra_info` (`--benchmark-json=FILE` keeps it) and on standard output. The caps
stand for a link's limits: SIDP_CPU_LINK_GBPS what one reader takes in, SIDP_CPU_OWNER_GBPS what one owner gives out
to all of its readers together.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
import time

import pytest
import torch

from sidp import FFNSpec, PoolConfig, WeightPool, ffn_forward
from sidp.launch import launch

pytestmark = pytest.mark.timeout(300)


def report(benchmark, **figures):
    benchmark.extra_info.update(figures)
    print("\n" + ", ".join(f"{name} = {value:.4g}" for name, value in figures.items()))


def weights(spec: FFNSpec, layer: int) -> dict[str, torch.Tensor]:
    seed = torch.Generator().manual_seed(layer)
    return {t.name: torch.randn(t.shape, generator=seed).to(t.dtype) * 0.05 for t in spec.unit().tensors}


def committed_pool(spec: FFNSpec, layers: int, config: PoolConfig) -> WeightPool:
    pool = WeightPool([spec] * layers, config=config)
    for layer in range(layers):
        if pool.owns(layer):
            pool.load(layer, weights(spec, layer))
    pool.commit()
    return pool


class PlainFFN(torch.nn.Module):
    """The same formula as an ordinary module with its own parameters."""

    def __init__(self, spec: FFNSpec, layer: int) -> None:
        super().__init__()
        for name, value in weights(spec, layer).items():
            linear = torch.nn.Linear(value.shape[1], value.shape[0], bias=False, dtype=spec.dtype)
            linear.weight = torch.nn.Parameter(value, requires_grad=False)
            setattr(self, name, linear)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


# ---- a: the host time of a call whose layer is ready --------------------------------------------------------


def time_calls(context, rounds):
    """Medians in seconds, over `rounds` calls in turn, of the pooled FFN and the plain module; the stalls."""
    spec = FFNSpec(8, 32, dtype=torch.float32)  # tiny: what is left is the host's own time
    pool = committed_pool(spec, 2, PoolConfig(mode="was", slots=1))
    remote = 1 - context.rank
    x, plain = torch.ones(1, 8), PlainFFN(spec, remote)
    pooled_s, plain_s = [], []
    with torch.inference_mode():
        for _ in range(rounds if context.rank == 0 else 0):
            ffn_forward(x, pool, 0)
            time.sleep(0.0005)  # until the remote layer is here again
            for seconds, call in ((plain_s, lambda: plain(x)), (pooled_s, lambda: ffn_forward(x, pool, remote))):
                call() if seconds is plain_s else None  # both find their code and their data warm
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
    stalls = pool.stats().stalls
    pool.close()
    return (statistics.median(pooled_s), statistics.median(plain_s), stalls) if pooled_s else None


def test_host_time_of_a_ready_layer(benchmark):
    pooled, plain, stalls = benchmark.pedantic(launch, args=(time_calls, 2, (2000,)), rounds=1)[0]
    report(benchmark, pooled_us=pooled * 1e6, plain_us=plain * 1e6, more_us=(pooled - plain) * 1e6, stalls=stalls)


# ---- b: stalls where the link is fast enough to hide the fetches --------------------------------------------


def stall_figures(context, forwards):
    """(stall seconds in the first forward, in the rest, seconds of the rest, stalls in the rest)."""
    spec = FFNSpec(256, 1024, dtype=torch.float32)  # 3.1 MB a layer: 3.1 ms at the cap
    pool = committed_pool(spec, 8, PoolConfig(mode="was"))
    x = torch.ones(1, 256)
    with torch.inference_mode():
        forward(pool, x, 8)
        first, start = pool.stats(), time.perf_counter()
        for _ in range(forwards):
            forward(pool, x, 8)
        seconds = time.perf_counter() - start
    last = pool.stats()
    pool.close()
    rest = last.stall_seconds - first.stall_seconds
    return first.stall_seconds, rest, seconds, last.stalls - first.stalls


def forward(pool, x, layers):
    for layer in range(layers):
        time.sleep(0.005)  # stands for attention, at 5 ms a layer; every second layer is remote
        ffn_forward(x, pool, layer)


def test_stalls_where_the_link_allows_hiding(benchmark, monkeypatch):
    monkeypatch.setenv("SIDP_CPU_LINK_GBPS", "1.0")
    results = benchmark.pedantic(launch, args=(stall_figures, 2, (20,)), rounds=1)
    worst = max(results, key=lambda result: result[1])
    report(benchmark, first_forward_stall_ms=worst[0] * 1e3, later_stall_ms=worst[1] * 1e3,
           later_stall_percent=100 * worst[1] / worst[2], later_stalls=worst[3])  # fmt: skip


# ---- c: four readers, each owner's egress capped, with and without peak shifting ----------------------------


def seconds_per_forward(context, peak_shifting, forwards):
    """Seconds of a forward after two to warm up. Compute is a sleep, so that four ranks fit two cores."""
    import torch.distributed as dist

    spec = FFNSpec(256, 1024, dtype=torch.float32)
    pool = committed_pool(spec, 16, PoolConfig(mode="was", peak_shifting=peak_shifting))
    start = 0.0
    for index in range(forwards + 2):
        if index == 2:
            dist.barrier()
            start = time.perf_counter()
        for layer in range(16):
            pool.acquire(layer)
            time.sleep(0.005)
            pool.release(layer)
    seconds = (time.perf_counter() - start) / forwards
    pool.close()
    return seconds, pool.slots


@pytest.mark.parametrize("owner_gbps", [0.3, 0.6])  # of an owner's egress, a forward takes 126 or 63 ms
def test_peak_shifting_with_capped_owners(benchmark, monkeypatch, owner_gbps):
    monkeypatch.setenv("SIDP_CPU_OWNER_GBPS", str(owner_gbps))
    monkeypatch.setenv("SIDP_SLOTS", "6")  # the same for both; 12 would hold every remote layer for good

    def both():
        return [launch(seconds_per_forward, 4, (shifting, 8)) for shifting in (True, False)]

    shifted, straight = benchmark.pedantic(both, rounds=1)
    slowest = [max(seconds for seconds, _ in results) for results in (shifted, straight)]
    report(benchmark, shifted_ms=slowest[0] * 1e3, straight_ms=slowest[1] * 1e3, speedup=slowest[1] / slowest[0],
           slots=shifted[0][1])  # fmt: skip


# ---- d: the copy engine against a bare memcpy ---------------------------------------------------------------


def copy_rates(context, rounds):
    """Median GB/s of the pool's fetches and of memcpy over a mapping of the same kind, bytes and thread."""
    spec = FFNSpec(1024, 5461, dtype=torch.float32)  # 67 MB a layer: far more than the caches
    pool = committed_pool(spec, 4, PoolConfig(mode="was", slots=1))
    nbytes = spec.unit().nbytes
    rates = None
    if context.rank == 0:
        pool.start_trace()
        remote = [layer for layer in range(4) if not pool.placement.local(layer, 0)]
        for index in range(rounds):
            pool.acquire(remote[index % len(remote)])
            pool.release(remote[index % len(remote)])
        pool.acquire(remote[rounds % len(remote)])  # ends with the last fetch
        pool.release(remote[rounds % len(remote)])
        fetches = [end - start for kind, _, _, start, end in pool.trace() if kind == "fetch"]
        rates = (nbytes / statistics.median(fetches) / 1e9, nbytes / statistics.median(memcpy(nbytes, rounds)) / 1e9)
    import torch.distributed as dist

    dist.barrier()
    pool.close()
    return rates


def memcpy(nbytes: int, rounds: int) -> list[float]:
    """Seconds of each bare copy out of two sources in turn into one target, in a thread as the copy engine has one."""
    sources = [torch.ones(nbytes, dtype=torch.uint8) for _ in range(2)]
    target = torch.zeros(nbytes, dtype=torch.uint8)
    seconds = []

    def work():
        for index in range(rounds):
            start = time.perf_counter()
            ctypes.memmove(target.data_ptr(), sources[index % 2].data_ptr(), nbytes)
            seconds.append(time.perf_counter() - start)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return seconds


def test_copy_rate_against_memcpy(benchmark):
    fetch, bare = benchmark.pedantic(launch, args=(copy_rates, 2, (30,)), rounds=1)[0]
    report(benchmark, fetch_gb_s=fetch, memcpy_gb_s=bare, ratio=fetch / bare)


# ---- e: what the policy takes of a call ----------------------------------------------------------------------


def test_policy_per_call(benchmark):
    """mode="auto": enter and leave around each of 64 layers, decisions and learning included."""
    from sidp._native import C
    from sidp.policy import AutoPolicy

    class Ring:
        def pause(self): ...

        def resume(self): ...

        def stats(self):
            return C.RingStats()

    model = C.PolicyModel()
    model.layers, model.remote_layers, model.fetch_bytes, model.link_bytes_per_s = 64, 48, 60e6, 1e9
    model.compute = C.TimeTable([(1, 1e-4), (64, 2e-4)])
    chooser = AutoPolicy(model, Ring(), C.CasRequesterStats)

    def iterations(count: int) -> float:
        start = time.perf_counter()
        for index in range(count):
            for layer in range(64):
                chooser.enter(layer, 1 if index % 20 < 10 else 4096)
                chooser.leave()
        return (time.perf_counter() - start) / (64 * count)

    seconds = benchmark.pedantic(lambda: min(iterations(100) for _ in range(10)), rounds=1, warmup_rounds=1)
    report(benchmark, policy_us_per_call=seconds * 1e6, decisions_kept=len(chooser.decisions))


def test_machine(benchmark):
    """Not a figure: says under what load the others ran."""
    benchmark.pedantic(lambda: None, rounds=1)
    report(benchmark, cores=os.cpu_count(), load_1min=os.getloadavg()[0])

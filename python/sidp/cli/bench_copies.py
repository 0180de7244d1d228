"""Copies as `sidp bench` measures them, in nvbandwidth's manner: gated, median, bytes verified, waived with a reason."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch

from ..errors import SidpError

_SLICES_MB = (4, 16, 32, 64)
_COPIES = 4  # in a row, so that what starting one costs is spread as a ring spreads it


def waived(what: str, reason: str) -> dict:
    return {"what": what, "waived": reason}


def copies(device: torch.device, nbytes: int, rounds: int) -> list[dict]:
    """Host memory to host memory on the CPU; host to device and back, and inside the device, on a GPU."""
    pinned = device.type == "cuda"
    host = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, pin_memory=pinned)
    if not pinned:
        return [_host_copy(host, rounds)]
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    back = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    inside = torch.empty_like(there)
    found = [_timed("pinned host to device", device, nbytes, rounds, lambda: there.copy_(host, non_blocking=True))]
    found.append(_timed("device to pinned host", device, nbytes, rounds, lambda: back.copy_(there, non_blocking=True)))
    found.append(_timed("device to itself (read and write)", device, 2 * nbytes, rounds, lambda: inside.copy_(there)))
    for target in (there.cpu(), back, inside.cpu()):
        _verify("a copy of host memory", target, host)
    return found


def between_gpus(device: torch.device, nbytes: int, rounds: int) -> list[dict]:
    """By the copy engine between every two GPUs of this process: one way, both ways, whole and in slices."""
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if count < 2:
        return [waived("copies between GPUs", f"{count} GPU{'s' if count != 1 else ''} here, it takes two")]
    sources = [_random_on(index, nbytes) for index in range(count)]
    found = []
    for reader in range(count):
        for owner in range(count):
            if owner == reader:
                continue
            if not torch.cuda.can_device_access_peer(reader, owner):
                found.append(waived(f"GPU {owner} to GPU {reader}", "peer access is not possible between them"))
                continue
            target = torch.zeros(nbytes, dtype=torch.uint8, device=f"cuda:{reader}")
            for slice_mb in (0, *_SLICES_MB) if (owner, reader) == (0, 1) else (0,):
                step = slice_mb << 20 or nbytes
                name = f"GPU {owner} to GPU {reader}" + (f", slices of {slice_mb} MB" if slice_mb else "")
                pull = _pull(target, sources[owner], step)
                found.append(_timed(name, torch.device("cuda", reader), nbytes, rounds, pull))
                _verify(name, target.cpu(), sources[owner].cpu())
                target.zero_()
            if owner < reader:
                found.append(_both_ways(owner, reader, sources, nbytes, rounds))
    return found


def _random_on(index: int, nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=f"cuda:{index}")


def _pull(target: torch.Tensor, source: torch.Tensor, step: int) -> Callable[[], None]:
    def pull():
        for begin in range(0, target.numel(), step):
            target[begin : begin + step].copy_(source[begin : begin + step], non_blocking=True)

    return pull


def _both_ways(a: int, b: int, sources: list[torch.Tensor], nbytes: int, rounds: int) -> dict:
    """Each GPU reads the other at once; by the wall clock, from before the first to after the last."""
    targets = [torch.zeros(nbytes, dtype=torch.uint8, device=f"cuda:{index}") for index in (a, b)]
    streams = [torch.cuda.Stream(index) for index in (a, b)]
    seconds = []
    for _ in range(rounds + 1):
        for index in (a, b):
            torch.cuda.synchronize(index)
        begin = time.perf_counter()
        for stream, target, other in zip(streams, targets, (b, a), strict=True):
            with torch.cuda.stream(stream):
                for _ in range(_COPIES):
                    target.copy_(sources[other], non_blocking=True)
        for stream in streams:
            stream.synchronize()
        seconds.append(time.perf_counter() - begin)
    for target, other in zip(targets, (b, a), strict=True):
        _verify(f"GPU {a} and GPU {b}, both ways", target.cpu(), sources[other].cpu())
    rate = 2 * _COPIES * nbytes / statistics.median(seconds[1:]) / 1e9
    return {"what": f"GPU {a} and GPU {b}, both ways together", "gb_s": rate, "verified": True}


def _timed(what: str, device: torch.device, nbytes: int, rounds: int, copy: Callable[[], object]) -> dict:
    """GB/s by events around a few copies in a row; the first round is not counted."""
    with torch.cuda.device(device):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 2)]
        marks[0].record()
        for mark in marks[1:]:
            for _ in range(_COPIES):
                copy()
            mark.record()
        marks[-1].synchronize()
        times = [before.elapsed_time(after) for before, after in pairwise(marks)][1:]
    return {"what": what, "gb_s": _COPIES * nbytes / statistics.median(times) / 1e6, "verified": True}


def _host_copy(source: torch.Tensor, rounds: int) -> dict:
    target, seconds = torch.zeros_like(source), []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - begin)
    _verify("host memory to host memory", target, source)
    rate = source.numel() / statistics.median(seconds[1:]) / 1e9
    return {"what": "host memory to host memory", "gb_s": rate, "verified": True}


def _verify(what: str, target: torch.Tensor, source: torch.Tensor) -> None:
    if not torch.equal(target, source):
        raise SidpError(f"{what}: the bytes that arrived are not those that were sent; this machine cannot be trusted")

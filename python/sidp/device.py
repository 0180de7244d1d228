"""The device a pool computes on, and what the GPUs of this machine can do for one."""

from __future__ import annotations

import os
from typing import Any

import torch

from ._native import C
from .errors import ConfigError


def choose_device(device) -> torch.device:
    """The device a pool computes on; None takes the current CUDA device where the build and the machine have one."""
    with_cuda = getattr(C, "with_cuda", False) and torch.cuda.is_available()
    chosen = torch.device(("cuda" if with_cuda else "cpu") if device is None else device)
    if chosen.type == "cuda" and with_cuda:
        return torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
    if chosen.type != "cpu":
        raise ConfigError(
            f"device={device!r}: this build or machine has the CPU backend only; use device='cpu' or leave it out"
        )
    return chosen


class _DeviceBuffer:
    """What torch reads an address from; the tensor keeps this object, and this object keeps the memory's owner."""

    def __init__(self, address: int, nbytes: int, owner: Any):
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def device_bytes(address: int, nbytes: int, owner: Any, device: torch.device) -> torch.Tensor:
    """A uint8 tensor over ``nbytes`` of device memory; ``owner`` lives at least as long as any view of it."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        return torch.as_tensor(_DeviceBuffer(address, nbytes, owner), device=device)


def device_report() -> list[dict]:
    """What each GPU of this machine can do for a pool; empty where the build or the machine has none."""
    if not getattr(C, "with_cuda", False):
        return []
    report = []
    for index in range(C.cuda_device_count()):
        facts = C.cuda_device_facts(index)
        report.append(
            {
                "index": index,
                "name": facts.name,
                "uuid": facts.uuid,
                "pci": facts.pci,
                "multiprocessors": facts.multiprocessors,
                "copy_engines": facts.copy_engines,
                "total_bytes": facts.total_bytes,
                "free_bytes": facts.free_bytes,
                "reaches": list(facts.peers),
                "reaches_rank": list(facts.peer_ranks),
                "vmm_refusal": C.vmm_refusal(index),
                # Where MPS puts its pipes unless it is told otherwise.
                "mps": bool(os.environ.get("CUDA_MPS_PIPE_DIRECTORY")) or os.path.exists("/tmp/nvidia-mps/control"),
            }
        )
    return report

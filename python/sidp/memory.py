"""Tensors over native memory. A view keeps what owns the memory alive, so it can never point at freed pages."""

from __future__ import annotations

import ctypes
from typing import Any

import torch


def host_bytes(address: int, nbytes: int, owner: Any) -> torch.Tensor:
    """A uint8 CPU tensor over ``nbytes`` at ``address``; ``owner`` lives at least as long as any view of it."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    buffer = (ctypes.c_ubyte * nbytes).from_address(address)
    buffer.owner = owner
    return torch.frombuffer(buffer, dtype=torch.uint8)


def view(memory: torch.Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of ``shape`` and ``dtype`` over the bytes of ``memory`` from ``offset`` on."""
    count = dtype.itemsize
    for n in shape:
        count *= n
    return memory[offset : offset + count].view(dtype).view(shape)

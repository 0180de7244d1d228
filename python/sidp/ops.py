"""``sidp::ffn``, the opaque operator that torch.compile sees in place of a pooled FFN."""

from __future__ import annotations

import itertools
import weakref

import torch

_pools: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register(pool) -> int:
    """A number by which compiled code finds ``pool``."""
    number = next(_numbers)
    _pools[number] = pool
    return number


@torch.library.custom_op("sidp::ffn", mutates_args=())
def ffn(x: torch.Tensor, pool: int, layer: int) -> torch.Tensor:
    """The FFN of ``layer`` of the pool with that number, on x [..., H]."""
    from .errors import PoolClosedError
    from .ffn import ffn_forward

    found = _pools.get(pool)
    if found is None:
        raise PoolClosedError("the pool that this code was compiled for is gone: compile it again with a new pool")
    return ffn_forward(x, found, layer)


@ffn.register_fake
def _(x: torch.Tensor, pool: int, layer: int) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)

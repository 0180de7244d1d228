"""What vLLM's CPU worker must know to size the KV cache."""

from __future__ import annotations

import time

from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from ..pool import WeightPool
from .mlp import pooled_mlps

_SETTLE_S = 10.0


def leave_peers_out_of_rss() -> None:
    """Idempotent: from here on the worker counts its own memory only.

    It takes the process's resident set for what the engine uses, right after the warm-up. That set holds the pages of
    other ranks' shares that this process has read, which are theirs; mapped again at the next use, they cost nothing.
    """
    own = CPUModelRunner.warming_up_model
    if getattr(own, "_sidp", False):
        return

    def warming_up_model(self, *args, **kwargs):
        own(self, *args, **kwargs)
        for mlp in pooled_mlps(self.get_model())[:1]:
            _fill_ring(mlp.pool)
            mlp.pool.forget_peers()

    warming_up_model._sidp = True
    CPUModelRunner.warming_up_model = warming_up_model


def _fill_ring(pool: WeightPool) -> None:
    """Waits until the first fetches have made the slots resident: they are this process's own. Bounded."""
    end = time.monotonic() + _SETTLE_S
    while (stats := pool.stats()).fetches < stats.slots and not stats.pauses and time.monotonic() < end:
        time.sleep(0.01)

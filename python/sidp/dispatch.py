"""Which mode a call takes: what config or policy wish, and whether CaS can have this layer and this input."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import cas, policy
from .config import PoolConfig, Unit


def wants_cas(config: PoolConfig, units: Sequence[Unit], world_size: int, cuda: bool) -> bool:
    """Whether a rank with this config asks for CaS. ConfigError where it does and no layer can be served."""
    if config.mode == "cas":
        cas.geometry(units, max(1, world_size), config.placement == "striped", cuda)
        return True
    if config.mode != "auto":
        return False
    if cuda:
        return not (config.host_tier or config.redundancy) and any(cas.reachable(units, cuda=True))
    return policy.auto_may_use_cas(units)


class Dispatch:
    """The CaS side of a committed pool: the client, and what decides whether a call goes to it.

    Args:
        mode: the config's. units: the pool's.
        client: a CpuCas or CudaCas.
        chooser: an AutoPolicy, or None where ``mode`` is not "auto".
        device_type: "cpu" or "cuda".
    """

    def __init__(self, mode: str, units: Sequence[Unit], client, chooser, device_type: str):
        self._mode, self._formulas = mode, [unit.formula for unit in units]
        self.client, self.chooser, self._device_type = client, chooser, device_type

    def takes(self, layer: int, x: torch.Tensor) -> bool:
        """Before a call: whether it goes to the owners. Pair it with ``done`` after the call."""
        if self.chooser is None:
            chosen = self._mode == "cas"
        else:
            chosen = self.chooser.enter(layer, x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else 0)
        return chosen and self._can_send(layer, x)

    def done(self) -> None:
        if self.chooser is not None:
            self.chooser.leave()

    def _can_send(self, layer: int, x: torch.Tensor) -> bool:
        spec = self._formulas[layer]
        return (
            self.client.reaches[layer]
            and x.dtype is spec.dtype
            and x.shape[-1] == spec.hidden_size
            and not torch.is_autocast_enabled(self._device_type)
        )

    def why(self, mode: str) -> str:
        """Why the newest call took ``mode``, "was" or "cas"."""
        if self.chooser is not None:
            return self.chooser.reason
        if mode == "cas":
            return "mode='cas' was asked for"
        if self._mode == "cas":
            return "CaS does not serve this layer, or the input is not what it takes: weights are fetched"
        return "weights are fetched ahead of use"

    def add_to(self, stats) -> None:
        stats.add_cas(self.client.requester_stats(), self.client.server_stats())
        if self.chooser is not None:
            stats.mode_switches, stats.decisions = self.chooser.switches, self.chooser.decisions

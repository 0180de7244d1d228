"""How a rank reaches the layers of a committed pool: where they lie, through the ring, or through CaS."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .control import ControlPlane
from .dispatch import Dispatch
from .errors import PeerError, SidpError
from .parts import layer_views, make_ring, ring_waits, start_cas
from .pool_plan import PoolPlan
from .shares import Shares
from .stats import PoolStats
from .survival import Reader, Survival


class Reach:
    """One rank's ring, CaS side and survival, from ``start`` to ``stop``, and its FFN calls through them.

    Args:
        plan, control, transport: the pool's, the transport not yet connected.

    Attributes:
        ring, dispatch: None where the pool has none, and after ``stop``.
        tensors: by layer, views at their static addresses.
    """

    def __init__(self, plan: PoolPlan, control: ControlPlane, transport):
        self._plan, self._control, self._transport = plan, control, transport
        self._timeout_s, self._on_gpu = plan.config.timeout_s, plan.on_gpu
        self.ring = None
        self.dispatch: Dispatch | None = None
        self._survival: Survival | None = None
        self.tensors: list[dict[str, torch.Tensor]] = []
        self._calls = {"local": 0, "was": 0, "cas": 0}
        self._last_mode = ""

    def start(self, shares: Shares, reader: Reader | None) -> None:
        """Collective: maps the peers' arenas and starts prefetching.

        Args:
            shares: loaded completely. reader: of the weights' files, for backup="file".
        """
        if self._plan.active:
            self._connect(reader)
        layers = range(len(self._plan.units))
        self.tensors = [layer_views(self._plan, shares, self._transport, self.ring, layer) for layer in layers]
        self._modes = ["local" if self._plan.local[layer] else "was" for layer in layers]

    def _connect(self, reader: Reader | None) -> None:
        plan = self._plan
        if plan.geometry is not None:
            self._transport.write_region_header(plan.geometry)
        self._transport.connect()
        self.ring = make_ring(plan, self._transport)
        if plan.geometry is not None:
            self.dispatch = start_cas(plan, self._transport, self.ring)
        if plan.config.redundancy:
            self._survival = Survival(self._control, self._transport, plan.placement, plan.units, plan.backups, reader)
            self._survival.copy_from_peers()
        self._control.barrier("committed")
        if self._survival is not None:
            self._survival.start(self.ring)

    # ---- calls --------------------------------------------------------------------------------------------------------

    def acquire(self, layer: int) -> dict[str, torch.Tensor]:
        """Waits for the layer's weights; to be paired with ``release``."""
        if self._survival is not None:
            self._acquire_outliving(layer)
        else:
            self._wait_for(layer)
        self._last_mode = mode = self._modes[layer]
        self._calls[mode] += 1
        return self.tensors[layer]

    def _wait_for(self, layer: int) -> None:
        if self.ring is not None:
            self.ring.acquire(layer, self._stream() if self._on_gpu else self._timeout_s)
        elif self._on_gpu:
            self._control.watch.check("using the pool")

    def _acquire_outliving(self, layer: int) -> None:
        while True:
            try:
                return self._wait_for(layer)
            except PeerError as error:
                self._survival.outlive(error)

    def release(self, layer: int) -> None:
        if self.ring is None:
            return
        if self._on_gpu:
            self.ring.release(layer, self._stream())
        else:
            self.ring.release(layer)

    def _stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self._plan.device.index)

    def run(self, layer: int, x: torch.Tensor, own: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        """The FFN of ``layer`` on x [..., H]: by CaS, or by ``own`` on the weights."""
        if self.dispatch is None:
            return self._run_here(layer, own)
        sends = self.dispatch.takes(layer, x)
        if sends and self._survival is not None:
            sends = self._survival.reaches(self._plan.placement.owner(layer))
        try:
            return self._send(layer, x) if sends else self._run_here(layer, own)
        except PeerError as error:
            if self._survival is None or not sends:
                raise
            self._survival.outlive(error)
            return self._run_here(layer, own)
        finally:
            self.dispatch.done()

    def _run_here(self, layer: int, own: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        weights = self.acquire(layer)
        try:
            return own(weights)
        finally:
            self.release(layer)

    def _send(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        self._calls["cas"] += 1
        self._last_mode = "cas"
        return self.dispatch.client.forward(layer, x, self._timeout_s)

    def check(self) -> None:
        """Raises what went wrong since the last call: in the group, or on the device."""
        try:
            self._control.watch.check("using the pool")
        except PeerError as error:
            if self._survival is None:
                raise
            self._survival.outlive(error)
        if self.dispatch is not None and self._on_gpu:
            self.dispatch.client.check()

    # ---- observation --------------------------------------------------------------------------------------------------

    def stats(self) -> PoolStats:
        plan = self._plan
        replicated, owned = plan.placement.replicated_bytes, plan.kept_bytes(plan.owner)
        ring_bytes = 0 if self.ring is None or self._ring_is_untouched() else self.ring.bytes
        cas_bytes = self.dispatch.client.memory_bytes if self.dispatch is not None and self._on_gpu else 0
        stats = PoolStats(
            rank=plan.rank,
            world_size=plan.world_size,
            active=plan.active,
            reason=plan.reason,
            replicated_bytes=replicated,
            owned_bytes=owned,
            ring_bytes=ring_bytes,
            cas_bytes=cas_bytes,
            freed_bytes=replicated - owned - ring_bytes - cas_bytes,
            slots=plan.slots,
            calls=dict(self._calls),
        )
        if self._survival is not None:
            stats.backup_bytes = plan.backups.kept_bytes(plan.rank)
            stats.lost_rank, stats.recovery_seconds = self._survival.lost, self._survival.recovery_seconds
        if self._last_mode:
            stats.last_mode = self._last_mode
            stats.last_mode_reason = self._why(self._last_mode)
        if self.ring is not None:
            stats.add_ring(self.ring.stats())
        if self.dispatch is not None:
            self.dispatch.add_to(stats)
        return stats

    def _ring_is_untouched(self) -> bool:
        """On the CPU memory is taken when it is written to first."""
        return not self._on_gpu and ring_waits(self._plan) and self.ring.stats().fetches == 0

    def _why(self, mode: str) -> str:
        if mode == "local":
            return "the layer is here"
        return "weights are fetched ahead of use" if self.dispatch is None else self.dispatch.why(mode)

    # ---- end ----------------------------------------------------------------------------------------------------------

    def settle(self) -> SidpError | None:
        """On GPUs: waits for what was enqueued, so that nothing reads the peers' memory afterwards. What went wrong in it."""
        if self.ring is not None:
            self.ring.stop()
        torch.cuda.synchronize(self._plan.device)
        try:
            if self.dispatch is not None:
                self.dispatch.client.check()
        except SidpError as error:
            return error
        return None

    def stop_serving(self) -> None:
        if self.dispatch is not None:
            self.dispatch.client.stop()

    def stop(self) -> None:
        """Ends every thread and lets go of all views; what was counted stays."""
        if self._survival is not None:
            self._survival.stop()
        self.stop_serving()
        if self.ring is not None:
            self.ring.stop()
        self.tensors = []
        self.ring = self.dispatch = None

"""The pool: FFN weights kept once in a group, every layer reachable from every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from . import ops, policy
from .config import FFNSpec, PoolConfig, Unit
from .control import ControlPlane
from .errors import ConfigError, PoolClosedError, SidpError
from .parts import open_transport
from .pool_plan import PoolPlan
from .reach import Reach
from .shares import Index, Shares
from .stats import PoolStats
from .survival import Reader


class WeightPool:
    """Collective: the FFN weights of ``specs``, kept once in ``group``.

    The ranks agree on specs and config here, before anything is allocated; then every rank calls ``load`` for each layer, and
    all of them ``commit``. Afterwards ranks are independent until ``close``.

    Args:
        specs: one FFNSpec (or Unit) per layer.
        group: a torch.distributed process group; None takes the default group, or a group of one where torch.distributed
            is not initialised. Ranks without one in common pass a ``membership.Membership`` over a store of their own.
        config: how the pool behaves.

    Raises:
        ConfigError: a bad argument, or ranks that disagree.
        PeerError: a rank died or did not come within ``config.timeout_s``.
    """

    def __init__(self, specs: Sequence[FFNSpec | Unit], group=None, config: PoolConfig | None = None):
        self.config = config = PoolConfig() if config is None else config
        self._control = ControlPlane(group, config.timeout_s)
        self._closed = False
        self._committed = False
        self._on_close: list[Callable[[], None]] = []
        self._reader: Reader | None = None
        try:
            self._plan = plan = PoolPlan(specs, self._control, config)
            self._transport = open_transport(plan, self._control)
        except SidpError as error:
            self._control.fail(error)
            self._control.close()
            raise
        self.units, self.placement, self.device = plan.units, plan.placement, plan.device
        self.active, self.reason = plan.active, plan.reason
        self._formulas = [unit.formula for unit in self.units]
        self.handle = ops.register(self)
        self._shares = Shares(self.units, self.placement, plan.owner, self._transport.extents())
        self._reach = Reach(plan, self._control, self._transport)

    @property
    def rank(self) -> int:
        return self._control.rank

    @property
    def world_size(self) -> int:
        return self._control.world_size

    @property
    def num_layers(self) -> int:
        return len(self.units)

    @property
    def slots(self) -> int:
        """Of this rank's ring."""
        return self._plan.slots

    @property
    def closed(self) -> bool:
        return self._closed

    def formula(self, layer: int) -> FFNSpec | None:
        """The layer's FFNSpec; None where it was given as a Unit without one."""
        return self._formulas[self._check_layer(layer)]

    # ---- loading ------------------------------------------------------------------------------------------------------

    def owns(self, layer: int) -> bool:
        """Whether this rank keeps any bytes of ``layer``, so that loading it here has an effect."""
        return self.placement.share(self._check_layer(layer), self._plan.owner).bytes > 0

    def wants(self, layer: int, name: str) -> list[Index]:
        """The index ranges of tensor ``name`` of ``layer`` that this rank keeps; empty where it keeps none."""
        return self._shares.wants(self._check_layer(layer), name)

    def load(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Gives the weights of ``layer``; only this rank's share is kept (copied).

        Args:
            tensors: every tensor of the layer by name: "gate", "up", "down" (Linear layout, [out, in]), "gate_bias", ...

        Raises:
            LayoutError: a name, shape or dtype that the layer's spec does not have.
            ConfigError: no such layer, loaded twice, or after commit().
        """
        self._check_loadable(layer)
        self._shares.load(layer, tensors)

    def load_tensor(self, layer: int, name: str, tensor: torch.Tensor) -> None:
        """``load`` for one tensor, for loaders that read one at a time."""
        self._check_loadable(layer)
        self._shares.load_tensor(layer, name, tensor)

    def load_slice(self, layer: int, name: str, index: Index, tensor: torch.Tensor) -> None:
        """``load`` for one of the ranges that ``wants(layer, name)`` names, for loaders that read slices of files."""
        self._check_loadable(layer)
        self._shares.load_slice(layer, name, index, tensor)

    def _check_loadable(self, layer: int) -> None:
        self._check_open()
        self._check_layer(layer)
        if self._committed:
            raise ConfigError(
                f"load({layer}, ...) after commit(): weights are fixed then; make a new pool for new weights"
            )

    def backup_from(self, reader: Reader) -> None:
        """With backup="file": ``reader(layer, name, index)`` returns that part of tensor ``name``, in its dtype, when asked
        after a loss. To be given before commit(), on every rank.
        """
        self._check_open()
        self._reader = reader

    # ---- commit -------------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Collective: exchange handles, map the peers' arenas, start prefetching. Call it once, after loading."""
        self._check_open()
        if self._committed:
            raise ConfigError("commit() was called already: once is enough")
        try:
            self._shares.check_complete()
            self._reach.start(self._shares, self._reader)
        except SidpError as error:
            cause = self._control.first_cause(error)
            self._control.fail(error)
            self._tear_down()
            raise cause from (error.__cause__ if cause is error else error)
        self._committed = True

    # ---- use ----------------------------------------------------------------------------------------------------------

    def tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """Views of the layer's weights at their static addresses. Read them only between acquire and release."""
        self._check_committed()
        return self._reach.tensors[self._check_layer(layer)]

    def acquire(self, layer: int) -> dict[str, torch.Tensor]:
        """Waits until the layer's weights are here and returns ``tensors(layer)``; pair it with ``release(layer)``.

        Raises:
            PeerError: a rank of the group died, or the bytes did not come within ``config.timeout_s``.
            PoolClosedError: the pool is closed.
        """
        if not self._committed or self._closed:
            self._check_committed()
        self._check_layer(layer)
        return self._reach.acquire(layer)

    def release(self, layer: int) -> None:
        """Hands the layer's slot back, so that the next fetch into it may start."""
        self._reach.release(layer)

    def run(self, layer: int, x: torch.Tensor, own: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        """The FFN of ``layer`` on x [..., H], in the mode that config or policy picks.

        In CaS the owners compute it by the layer's formula; otherwise ``own(tensors(layer))`` is called between
        acquire and release. CaS is taken only for x of the formula's dtype and width, outside autocast.

        Raises:
            PeerError: a rank that is needed died or does not answer. PoolClosedError: the pool is closed.
        """
        self._check_committed()
        self._check_layer(layer)
        return self._reach.run(layer, x, own)

    def check(self) -> None:
        """Raises what went wrong on the device since the last call; on GPUs calls return before their work is done.

        Raises:
            PeerError: a rank died or did not answer in time. PoolClosedError: the pool is closed.
        """
        self._check_committed()
        self._reach.check()

    def _check_layer(self, layer: int) -> int:
        if not isinstance(layer, int) or not 0 <= layer < len(self.units):
            raise ConfigError(f"layer {layer!r} does not exist: the pool has layers 0 ... {len(self.units) - 1}")
        return layer

    def _check_open(self) -> None:
        if self._closed:
            raise PoolClosedError("the pool is closed: its weights are gone; make a new pool")

    def _check_committed(self) -> None:
        self._check_open()
        if not self._committed:
            raise ConfigError("the pool is not committed yet: load every layer, then call commit() on all ranks")

    @property
    def _ring(self):
        return self._reach.ring

    @property
    def _dispatch(self):
        return self._reach.dispatch

    # ---- observation --------------------------------------------------------------------------------------------------

    def stats(self) -> PoolStats:
        """What the pool has done since commit()."""
        return self._reach.stats()

    @property
    def chooser(self) -> policy.Chooser | None:
        """What picks the mode of this rank's iterations in mode "auto", and can be pinned; None where nothing is to pick."""
        return None if self._dispatch is None else self._dispatch.chooser

    def start_trace(self, capacity: int = 100_000) -> None:
        """Records what the ring does from now on, at most ``capacity`` events."""
        self._check_committed()
        if self._ring is not None:
            self._ring.start_trace(capacity)

    def trace(self) -> list[tuple[str, int, int, float, float]]:
        """(kind, layer, slot, begin, end) since start_trace(); kind is "fetch", "compute" or "stall", times in seconds."""
        return [] if self._ring is None else self._ring.trace()

    def forget_peers(self) -> None:
        """Where the peers' shares are mapped into this process (on the CPU), takes them out of its resident set."""
        self._check_committed()
        if self.active and not self._plan.on_gpu:
            self._transport.forget_peers()

    # ---- end ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Collective, bounded and idempotent: serves the others until all have closed or died, then frees the memory.

        Raises (on GPUs) what went wrong in calls whose work the device had not done yet when they returned.
        """
        if self._closed:
            return
        self._closed = True
        failure = None
        try:
            if self._committed and self.active:
                if self._plan.on_gpu:
                    failure = self._reach.settle()
                self._transport.serve_until_all_closed(self._reach.stop_serving)
        except (
            BaseException
        ) as error:  # an interrupt, say: the others must not take this rank for one that closed in its turn
            self._control.fail(error)
            self._transport.mark_failed()
            raise
        finally:
            self._tear_down()
        if failure is not None:
            raise failure

    def on_close(self, callback: Callable[[], None]) -> None:
        """Calls ``callback()`` when the pool closes or fails, before its memory goes, so that views can be dropped."""
        self._on_close.append(callback)

    def _tear_down(self) -> None:
        self._closed = True
        for callback in self._on_close:
            callback()
        self._on_close.clear()
        self._reach.stop()
        self._shares.memory = None
        self._reader = None
        self._transport.close()
        self._control.close()

    def _note_a_death(self, error: BaseException) -> None:
        """On GPUs a rank that dies can show in another's CUDA context first, in an error that is not ours and does not name it."""
        dead = self._control.watch.dead_rank()
        if dead >= 0 and not isinstance(error, SidpError) and hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"sidp: rank {dead} of this rank's group has died; this may be what came of it")

    def __enter__(self) -> WeightPool:
        return self

    def __exit__(self, kind, value, traceback) -> None:
        if value is None:
            self.close()
        elif not self._closed:
            self._note_a_death(value)
            # The others must not wait for a rank that is on its way out.
            self._control.fail(value)
            self._transport.mark_failed()
            self._tear_down()

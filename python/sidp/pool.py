"""The pool: FFN weights kept once in a group, every layer reachable from every rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from . import cas, cas_cpu, cas_cuda, ops, policy, policy_cuda
from ._native import C
from .agreement import agree, units_of
from .backups import BackupPlan
from .config import FFNSpec, PoolConfig, Unit
from .control import ControlPlane
from .dispatch import Dispatch, wants_cas
from .errors import ConfigError, PeerError, PoolClosedError, SidpError
from .memory import host_bytes
from .shares import Index, Shares, unit_layout, unit_views
from .slots import choose_slots
from .spill import cut_of, on_device
from .stats import PoolStats
from .survival import Reader, Survival
from .transport import LocalMemory, ShmTransport
from .transport_cuda import HostTransport, choose_device, device_bytes, open_gpu_transport

logger = logging.getLogger(__name__)


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
        self._tensors: list[dict[str, torch.Tensor]] = []
        self._on_close: list[Callable[[], None]] = []
        self._ring = None
        self._dispatch: Dispatch | None = None
        self._survival: Survival | None = None
        self._reader: Reader | None = None
        try:
            self.units = units_of(specs)
            self._formulas = [unit.formula for unit in self.units]
            self._check_config()
            self._agree()
            self._plan()
            self._transport = self._open_transport()
        except SidpError as error:
            self._control.fail(error)
            self._control.close()
            raise
        self.handle = ops.register(self)
        self._shares = Shares(self.units, self.placement, self._plan_rank, self._transport.extents())
        self._calls = {"local": 0, "was": 0, "cas": 0}

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
    def closed(self) -> bool:
        return self._closed

    def formula(self, layer: int) -> FFNSpec | None:
        """The layer's FFNSpec; None where it was given as a Unit without one."""
        return self._formulas[self._check_layer(layer)]

    # ---- construction -------------------------------------------------------------------------------------------------

    def _check_config(self) -> None:
        config, world, layers = self.config, self.world_size, self.num_layers
        self.device = choose_device(config.device)
        self._on_gpu = self.device.type == "cuda"
        self._host_shares = config.host_tier  # shares lie in host memory, or in part; the computing is done on a GPU
        self._all_in_host = False
        self._gpu = C.cuda_device_facts(self.device.index).uuid if self._on_gpu else ""
        if config.host_tier and not self._on_gpu:
            raise ConfigError("host_tier=True needs the CUDA backend: leave it False on the CPU")
        if config.mode == "cas" and config.host_tier:
            raise ConfigError("mode='cas' asks the owners' GPUs, and host_tier=True has none: use 'was' or 'auto'")
        if config.resident_layers > layers:
            raise ConfigError(f"resident_layers={config.resident_layers} is more than the {layers} layers of the pool")
        if config.redundancy and (self._on_gpu or config.host_tier):
            raise ConfigError("redundancy=1 is offered on the CPU backend only by this version: use 0 on GPUs")
        pooled = layers - config.resident_layers
        if config.placement == "layer" and config.mode != "local" and world > pooled > 0:
            raise ConfigError(
                f"a group of {world} ranks is larger than the {pooled} layers to pool: with placement='layer' every rank owns "
                f"at least one; use a smaller group, fewer resident_layers or placement='striped'"
            )

    def _agree(self) -> None:
        wish = wants_cas(self.config, self.units, self.world_size, self._on_gpu)
        replies = agree(self._control, self.units, self.config, cas=wish, gpu=self._gpu)
        self._gpus = [reply["gpu"] for reply in replies]
        # The mode is each rank's own affair, but whoever wants CaS needs everybody's server.
        self._wants_cas, self._cas_offered = wish, any(reply["cas"] for reply in replies)

    def _plan(self) -> None:
        """Chooses placement and slots, and decides whether pooling pays at all."""
        config, world = self.config, self.world_size
        layouts = [unit_layout(unit) for unit in self.units]
        self.reason = ""
        self._plan_rank, plan_world = self.rank, world
        self.slots = 0
        if world == 1 and not config.host_tier:
            self.reason = "the group has one rank"
        elif config.mode == "local":
            self.reason = "mode='local' was asked for"
        elif config.resident_layers == self.num_layers:
            self.reason = "all layers are resident"
        else:
            self._choose_slots(C.Placement(config.placement, layouts, world, config.resident_layers))
        if self.reason:
            self._plan_rank, plan_world = 0, 1
            logger.info("sidp: weights stay local on every rank: %s", self.reason)
        self.active = not self.reason
        resident = config.resident_layers if self.active else 0
        self.placement = C.Placement(config.placement, layouts, plan_world, resident)
        self._local = self._local_layers(self.placement, self.rank) if self.active else [True] * self.num_layers
        self._geometry = None
        if self.active and self._cas_offered and self._somebody_is_remote():
            self._geometry = cas.geometry(self.units, world, config.placement == "striped", self._on_gpu)

    def _somebody_is_remote(self) -> bool:
        return not all(all(self._local_layers(self.placement, rank)) for rank in range(self.world_size))

    def _local_layers(self, placement, rank: int) -> list[bool]:
        """By layer: whether ``rank`` reads it where it lies, without a fetch."""
        layers = range(self.num_layers)
        if self.config.host_tier:
            cut = self._cut(placement, rank)
            own = [
                cut > 0 and placement.local(layer, rank) and on_device(placement, rank, layer, cut) for layer in layers
            ]
            return [own[layer] or placement.resident(layer) for layer in layers]
        here = [placement.local(layer, rank) for layer in layers]
        if self._on_gpu and self.config.placement == "layer" and not self.config.force_fetch:
            for layer in layers:  # an owner on the same GPU is read in place
                owner = placement.owner(layer)
                here[layer] = here[layer] or (owner >= 0 and self._gpus[owner] == self._gpus[rank])
        return here

    def _choose_slots(self, placement) -> None:
        config, ranks = self.config, range(self.world_size)
        local = [self._local_layers(placement, rank) for rank in ranks]
        kept = [self._kept_bytes(placement, rank) for rank in ranks]
        slots, pays = choose_slots(placement, config.slots, config.peak_shifting, local, kept)
        self.slots = slots[self.rank]
        # An explicit number of slots is an explicit wish to pool; only the automatic choice may decline.
        if config.slots is None and not pays:
            self.reason = (
                f"pooling would free nothing: a share and {self.slots} ring slot(s) take as much as the "
                f"{placement.replicated_bytes} bytes of the weights themselves"
            )
            self.slots = 0
        elif config.slots is None and config.mode == "cas":
            self.slots = min(1, self.slots)  # only for what CaS cannot serve

    def _cut(self, placement, rank: int) -> int:
        """In the host tier: how much of the rank's share is on its device all the same."""
        return cut_of(placement, rank, self.num_layers, self.config.device_bytes) if self.config.device_bytes else 0

    def _kept_bytes(self, placement, rank: int) -> int:
        """Of the memory that ``rank`` computes in, what its share takes; of what lies in host memory only resident layers."""
        if self._host_shares and not self.reason:
            cut = 0 if self._all_in_host else self._cut(placement, rank)
            copied = [
                n for n in range(self.num_layers) if placement.resident(n) and not on_device(placement, rank, n, cut)
            ]
            return cut + sum(placement.unit(layer).bytes for layer in copied)
        return placement.arena_bytes(rank) + self._plan_backups(placement).kept_bytes(rank)

    def _plan_backups(self, placement) -> BackupPlan:
        pools = self.config.redundancy and not self.reason
        world = 1 if self.reason else self.world_size  # a pool that keeps all weights local is one rank's affair
        return BackupPlan(placement, world, self.num_layers, self.config.backup if pools else None)

    def _open_transport(self):
        if not self.active:
            return LocalMemory(self.placement.arena_bytes(self._plan_rank), self.device)
        self._backups = self._plan_backups(self.placement)
        sizes = self._backups.extent_bytes()
        region_bytes = 0 if self._geometry is None else self._geometry.bytes
        if not self._on_gpu:
            return ShmTransport(self._control, sizes, region_bytes)
        if self.config.host_tier:
            cuts = [self._cut(self.placement, rank) for rank in range(self.world_size)]
            if not any(cuts):
                return HostTransport(self._control, sizes, self.device)
            return open_gpu_transport(self._control, sizes, self.device, cuts=cuts)
        transport = open_gpu_transport(self._control, sizes, self.device, region_bytes)
        if region_bytes and not transport.region_bytes:
            logger.warning("sidp: CaS is off: no GPU can write to another's memory here")
            self._geometry = None
        return transport

    # ---- loading ------------------------------------------------------------------------------------------------------

    def owns(self, layer: int) -> bool:
        """Whether this rank keeps any bytes of ``layer``, so that loading it here has an effect."""
        return self.placement.share(self._check_layer(layer), self._plan_rank).bytes > 0

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
            if self.active:
                if self._geometry is not None:
                    self._transport.write_region_header(self._geometry)
                self._transport.connect()
                self._ring = self._make_ring()
                if self._geometry is not None:
                    self._dispatch = self._start_cas()
                if self.config.redundancy:
                    self._survival = Survival(
                        self._control, self._transport, self.placement, self.units, self._backups, self._reader
                    )
                    self._survival.copy_from_peers()
                self._control.barrier("committed")
                if self._survival is not None:
                    self._survival.start(self._ring)
        except SidpError as error:
            cause = self._control.first_cause(error)
            self._control.fail(error)
            self._tear_down()
            raise cause from (error.__cause__ if cause is error else error)
        self._tensors = [self._views(layer) for layer in range(self.num_layers)]
        self._modes = ["local" if self._is_local(layer) else "was" for layer in range(self.num_layers)]
        self._committed = True

    def _start_cas(self) -> Dispatch:
        striped, chooser = self.config.placement == "striped", None
        common = (self.units, self.placement, self.rank, self._geometry, striped)
        chooses = self._wants_cas and self.config.mode == "auto"
        arguments = self._transport.cas_arguments()
        if self._on_gpu:
            client = cas_cuda.CudaCas(*common, self._local, self.config.cas_sms, self.config.timeout_s, arguments)
            if chooses:
                chooser = policy_cuda.start(self, client, self._transport)
        else:
            blas = C.open_blas(cas_cpu.blas_libraries())
            client = cas_cpu.CpuCas(*common, blas=blas, **arguments)
            if chooses:
                chooser = policy.start(self, client, blas)
        return Dispatch(self.config.mode, self.units, client, chooser, self.device.type)

    def _make_ring(self):
        if self._on_gpu:
            return self._make_gpu_ring()
        return C.Ring(
            self.placement,
            self.rank,
            slots=self.slots,
            peak_shifting=self.config.peak_shifting,
            paused=self._ring_waits(),
            **self._transport.ring_arguments(),
        )

    def _ring_waits(self) -> bool:
        """Whether nothing is fetched until a call needs it: in mode "cas" most calls do not."""
        return self.config.mode == "cas" and self._geometry is not None

    def _make_gpu_ring(self):
        if self._transport.own_is_remote:  # also where host memory is the fallback: then nothing but residents is here
            self._host_shares = self._all_in_host = True
            self._local = [self.placement.resident(layer) for layer in range(self.num_layers)]
        if all(self._local):
            return None
        slots = self.slots or C.default_slots(self.placement, self.rank, self.config.peak_shifting, self._local)
        self.slots = slots
        return C.CudaRing(
            self.placement,
            self.rank,
            slots=slots,
            peak_shifting=self.config.peak_shifting,
            local=self._local,
            timeout_s=self.config.timeout_s,
            **self._transport.ring_arguments(),
        )

    def _is_local(self, layer: int) -> bool:
        return self._local[layer]

    def _local_views(self, layer: int) -> dict[str, torch.Tensor]:
        if self.active and self._on_gpu:
            owner = self.placement.owner(layer)
            if owner >= 0 and owner != self.rank:  # on this GPU
                extent, memory = self.placement.share(layer, owner), self._transport.extents_of(owner)
                return unit_views(self.units[layer], extent.pieces, memory, extent.offset)
            views = self._shares.whole_unit(layer)
            return {name: tensor.to(self.device) for name, tensor in views.items()}  # a copy in the host tier only
        return self._shares.whole_unit(layer)

    def _views(self, layer: int) -> dict[str, torch.Tensor]:
        if self._is_local(layer):
            return self._local_views(layer)
        schedule = self._ring.schedule
        slot = schedule.slot(schedule.remote_index(layer))
        layout = self.placement.unit(layer)
        address = self._ring.slot_address(slot)
        if self._on_gpu:
            memory = device_bytes(address, layout.bytes, self._ring, self.device)
        else:
            memory = host_bytes(address, layout.bytes, self._ring)
        return unit_views(self.units[layer], layout.tensors, memory, 0)

    # ---- use ----------------------------------------------------------------------------------------------------------

    def tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """Views of the layer's weights at their static addresses. Read them only between acquire and release."""
        self._check_committed()
        return self._tensors[self._check_layer(layer)]

    def acquire(self, layer: int) -> dict[str, torch.Tensor]:
        """Waits until the layer's weights are here and returns ``tensors(layer)``; pair it with ``release(layer)``.

        Raises:
            PeerError: a rank of the group died, or the bytes did not come within ``config.timeout_s``.
            PoolClosedError: the pool is closed.
        """
        if not self._committed or self._closed:
            self._check_committed()
        self._check_layer(layer)
        if self._survival is not None:
            self._acquire_outliving(layer)
        elif self._ring is not None:
            self._ring.acquire(layer, self._stream() if self._on_gpu else self.config.timeout_s)
        elif self._on_gpu:
            self._control.watch.check("using the pool")
        self._calls[self._modes[layer]] += 1
        self._last, self._last_mode = layer, self._modes[layer]
        return self._tensors[layer]

    def _acquire_outliving(self, layer: int) -> None:
        while True:
            try:
                return self._ring.acquire(layer, self.config.timeout_s)
            except PeerError as error:
                self._survival.outlive(error)

    def release(self, layer: int) -> None:
        """Hands the layer's slot back, so that the next fetch into it may start."""
        if self._ring is None:
            return
        if self._on_gpu:
            self._ring.release(layer, self._stream())
        else:
            self._ring.release(layer)

    def _stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.device.index)

    def run(self, layer: int, x: torch.Tensor, own: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        """The FFN of ``layer`` on x [..., H], in the mode that config or policy picks.

        In CaS the owners compute it by the layer's formula; otherwise ``own(tensors(layer))`` is called between
        acquire and release. CaS is taken only for x of the formula's dtype and width, outside autocast.

        Raises:
            PeerError: a rank that is needed died or does not answer. PoolClosedError: the pool is closed.
        """
        if self._dispatch is None:
            return self._run_here(layer, own)
        self._check_layer(layer)
        self._check_committed()
        sends = self._dispatch.takes(layer, x)
        if sends and self._survival is not None:
            sends = self._survival.reaches(self.placement.owner(layer))
        try:
            return self._send(layer, x) if sends else self._run_here(layer, own)
        except PeerError as error:
            if self._survival is None or not sends:
                raise
            self._survival.outlive(error)
            return self._run_here(layer, own)
        finally:
            self._dispatch.done()

    def check(self) -> None:
        """Raises what went wrong on the device since the last call; on GPUs calls return before their work is done.

        Raises:
            PeerError: a rank died or did not answer in time. PoolClosedError: the pool is closed.
        """
        self._check_committed()
        try:
            self._control.watch.check("using the pool")
        except PeerError as error:
            if self._survival is None:
                raise
            self._survival.outlive(error)
        if self._dispatch is not None and self._on_gpu:
            self._dispatch.client.check()

    def _run_here(self, layer: int, own: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        weights = self.acquire(layer)
        try:
            return own(weights)
        finally:
            self.release(layer)

    def _send(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        self._calls["cas"] += 1
        self._last, self._last_mode = layer, "cas"
        return self._dispatch.client.forward(layer, x, self.config.timeout_s)

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

    # ---- observation --------------------------------------------------------------------------------------------------

    def stats(self) -> PoolStats:
        """What the pool has done since commit()."""
        replicated = self.placement.replicated_bytes
        owned = self._kept_bytes(self.placement, self._plan_rank)
        ring_bytes = 0 if self._ring is None or self._ring_is_untouched() else self._ring.bytes
        cas_bytes = self._dispatch.client.memory_bytes if self._dispatch is not None and self._on_gpu else 0
        stats = PoolStats(
            rank=self.rank,
            world_size=self.world_size,
            active=self.active,
            reason=self.reason,
            replicated_bytes=replicated,
            owned_bytes=owned,
            ring_bytes=ring_bytes,
            cas_bytes=cas_bytes,
            freed_bytes=replicated - owned - ring_bytes - cas_bytes,
            slots=self.slots,
            calls=dict(self._calls),
        )
        if self._survival is not None:
            stats.backup_bytes = self._backups.kept_bytes(self.rank)
            stats.lost_rank, stats.recovery_seconds = self._survival.lost, self._survival.recovery_seconds
        if sum(self._calls.values()):
            stats.last_mode = self._last_mode
            stats.last_mode_reason = self._why(self._last_mode)
        if self._ring is not None:
            stats.add_ring(self._ring.stats())
        if self._dispatch is not None:
            self._dispatch.add_to(stats)
        return stats

    def _ring_is_untouched(self) -> bool:
        """On the CPU memory is taken when it is written to first."""
        return not self._on_gpu and self._ring_waits() and self._ring.stats().fetches == 0

    @property
    def chooser(self) -> policy.Chooser | None:
        """What picks the mode of this rank's iterations in mode "auto", and can be pinned; None where nothing is to pick."""
        return None if self._dispatch is None else self._dispatch.chooser

    def _why(self, mode: str) -> str:
        if mode == "local":
            return "the layer is here"
        return "weights are fetched ahead of use" if self._dispatch is None else self._dispatch.why(mode)

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
        if self.active and not self._on_gpu:
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
                if self._on_gpu:
                    failure = self._settle()
                self._transport.serve_until_all_closed(self._stop_serving)
        finally:
            self._tear_down()
        if failure is not None:
            raise failure

    def _settle(self) -> SidpError | None:
        """Waits for what was enqueued: nothing reads the peers' memory afterwards. What went wrong in it."""
        if self._ring is not None:
            self._ring.stop()
        torch.cuda.synchronize(self.device)
        try:
            if self._dispatch is not None:
                self._dispatch.client.check()
        except SidpError as error:
            return error
        return None

    def _stop_serving(self) -> None:
        if self._dispatch is not None:
            self._dispatch.client.stop()

    def on_close(self, callback: Callable[[], None]) -> None:
        """Calls ``callback()`` when the pool closes or fails, before its memory goes, so that views can be dropped."""
        self._on_close.append(callback)

    def _tear_down(self) -> None:
        self._closed = True
        for callback in self._on_close:
            callback()
        self._on_close.clear()
        if self._survival is not None:
            self._survival.stop()
        self._stop_serving()
        if self._ring is not None:
            self._ring.stop()
        self._tensors = []
        self._shares.memory = None
        self._ring = self._dispatch = self._reader = None
        self._transport.close()
        self._control.close()

    def __enter__(self) -> WeightPool:
        return self

    def __exit__(self, kind, value, traceback) -> None:
        if value is None:
            self.close()
        elif not self._closed:
            # The others must not wait for a rank that is on its way out.
            self._control.fail(value)
            self._transport.mark_failed()
            self._tear_down()

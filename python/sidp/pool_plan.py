"""What the ranks of a pool agree on and decide before memory is taken: where every byte lies, and what needs a fetch."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from . import cas
from ._native import C
from .agreement import agree, units_of
from .backups import BackupPlan, check_backup_on_gpus
from .config import FFNSpec, PoolConfig, Unit
from .control import ControlPlane
from .device import choose_device
from .dispatch import wants_cas
from .errors import ConfigError
from .shares import unit_layout
from .slots import choose_slots
from .spill import cut_of, on_device

logger = logging.getLogger(__name__)


class PoolPlan:
    """Collective: placement and slots of a pool, and whether pooling pays at all.

    Args:
        specs, config: the pool's. control: of its group.

    Attributes:
        units: one a layer. device, on_gpu: what this rank computes on.
        active: False where every rank keeps all weights; ``reason`` says why.
        placement: the native placement. owner: this rank's number in it, 0 in one that each rank has for itself.
        local: by layer, whether this rank reads it where it lies.
        slots: of this rank's ring.
        backups: where the second copies lie (redundancy=1).
        ranks_here: how many ranks compute on this rank's GPU.
        wants_cas: whether this rank asks for CaS. geometry: of the mailboxes; None where no rank uses CaS.

    Raises:
        ConfigError: a bad argument, or ranks that disagree. PeerError: a rank died or did not come in time.
    """

    def __init__(self, specs: Sequence[FFNSpec | Unit], control: ControlPlane, config: PoolConfig):
        self.config, self.rank, self.world_size = config, control.rank, control.world_size
        self.units = units_of(specs)
        self._layers = range(len(self.units))
        self._check_config()
        self._agree(control)
        self._layouts = [unit_layout(unit) for unit in self.units]
        self._all_in_host = False
        self.slots = 0
        self.reason = self._why_local()
        if not self.reason:
            self._place(self.world_size, config.resident_layers)
            self._choose_slots()
        if self.reason:
            self._place(1, 0)
            logger.info("sidp: weights stay local on every rank: %s", self.reason)
        self.active = not self.reason
        self.owner = self.rank if self.active else 0
        self.local = self._local_layers(self.rank) if self.active else [True] * len(self.units)
        self.geometry = None
        if self.active and self._cas_offered and self._somebody_is_remote():
            self.geometry = cas.geometry(self.units, self.world_size, self.striped, self.on_gpu)

    @property
    def striped(self) -> bool:
        return self.config.placement == "striped"

    def _check_config(self) -> None:
        config, world, layers = self.config, self.world_size, len(self.units)
        self.device = choose_device(config.device)
        self.on_gpu = self.device.type == "cuda"
        if config.host_tier and not self.on_gpu:
            raise ConfigError("host_tier=True needs the CUDA backend: leave it False on the CPU")
        if config.mode == "cas" and config.host_tier:
            raise ConfigError("mode='cas' asks the owners' GPUs, and host_tier=True has none: use 'was' or 'auto'")
        if config.resident_layers > layers:
            raise ConfigError(f"resident_layers={config.resident_layers} is more than the {layers} layers of the pool")
        if config.redundancy and self.on_gpu:
            _check_redundancy_on_gpus(config)
        pooled = layers - config.resident_layers
        if not self.striped and config.mode != "local" and world > pooled > 0:
            raise ConfigError(
                f"a group of {world} ranks is larger than the {pooled} layers to pool: with placement='layer' every rank owns "
                f"at least one; use a smaller group, fewer resident_layers or placement='striped'"
            )

    def _agree(self, control: ControlPlane) -> None:
        wish = wants_cas(self.config, self.units, self.world_size, self.on_gpu)
        gpu = C.cuda_device_facts(self.device.index).uuid if self.on_gpu else ""
        replies = agree(control, self.units, self.config, cas=wish, gpu=gpu)
        self._gpus = [reply["gpu"] for reply in replies]
        self.ranks_here = self._gpus.count(gpu)
        # The mode is each rank's own affair, but whoever wants CaS needs everybody's server.
        self.wants_cas, self._cas_offered = wish, any(reply["cas"] for reply in replies)

    def _why_local(self) -> str:
        """Why pooling is out of the question; empty where it is not."""
        if self.world_size == 1 and not self.config.host_tier:
            return "the group has one rank"
        if self.config.mode == "local":
            return "mode='local' was asked for"
        if self.config.resident_layers == len(self.units):
            return "all layers are resident"
        return ""

    def _place(self, world: int, resident_layers: int) -> None:
        self.placement = C.Placement(self.config.placement, self._layouts, world, resident_layers)
        self._plan_backups(world)

    def _plan_backups(self, world: int) -> None:
        kind = self.config.backup if self.config.redundancy and not self.reason else None
        on_device = self.on_gpu and not (self.config.host_tier or self._all_in_host)
        self.backups = BackupPlan(self.placement, world, len(self.units), kind, on_device)

    def _choose_slots(self) -> None:
        config, ranks = self.config, range(self.world_size)
        local = [self._local_layers(rank) for rank in ranks]
        kept = [self.kept_bytes(rank) for rank in ranks]
        slots, pays = choose_slots(self.placement, config.slots, config.peak_shifting, local, kept)
        self.slots = slots[self.rank]
        # An explicit number of slots is an explicit wish to pool; only the automatic choice may decline.
        if config.slots is None and not pays:
            self.reason = (
                f"pooling would free nothing: a share and {self.slots} ring slot(s) take as much as the "
                f"{self.placement.replicated_bytes} bytes of the weights themselves"
            )
            self.slots = 0
        elif config.slots is None and config.mode == "cas":
            self.slots = min(1, self.slots)  # only for what CaS cannot serve

    def _somebody_is_remote(self) -> bool:
        return not all(all(self._local_layers(rank)) for rank in range(self.world_size))

    def _local_layers(self, rank: int) -> list[bool]:
        """By layer: whether ``rank`` reads it where it lies, without a fetch."""
        placement = self.placement
        if self.config.host_tier:
            cut = self.cut(rank)
            own = [
                cut > 0 and placement.local(layer, rank) and on_device(placement, rank, layer, cut)
                for layer in self._layers
            ]
            return [own[layer] or placement.resident(layer) for layer in self._layers]
        here = [placement.local(layer, rank) for layer in self._layers]
        if self.on_gpu and not self.striped and not self.config.force_fetch:
            for layer in self._layers:  # an owner on the same GPU is read in place
                owner = placement.owner(layer)
                here[layer] = here[layer] or (owner >= 0 and self._gpus[owner] == self._gpus[rank])
        return here

    def cut(self, rank: int) -> int:
        """In the host tier: how much of the rank's share is on its device all the same."""
        nbytes = self.config.device_bytes
        return cut_of(self.placement, rank, len(self.units), nbytes) if nbytes else 0

    def kept_bytes(self, rank: int) -> int:
        """Of the memory that ``rank`` computes in, what its share takes; of what lies in host memory only resident layers."""
        placement = self.placement
        if (self.config.host_tier or self._all_in_host) and not self.reason:
            cut = 0 if self._all_in_host else self.cut(rank)
            copied = [n for n in self._layers if placement.resident(n) and not on_device(placement, rank, n, cut)]
            return cut + sum(placement.unit(layer).bytes for layer in copied)
        return placement.arena_bytes(rank) + self.backups.kept_bytes(rank)

    def move_to_host(self) -> None:
        """The transport found room in host memory only: nothing but residents is read where it lies."""
        self._all_in_host = True
        self._plan_backups(self.world_size)
        self.local = [self.placement.resident(layer) for layer in self._layers]


def _check_redundancy_on_gpus(config: PoolConfig) -> None:
    if config.mode == "cas":
        raise ConfigError(
            "redundancy=1 with mode='cas' is offered on the CPU backend only by this version: use mode='was', or redundancy=0"
        )
    check_backup_on_gpus(config.backup)
    if config.device_bytes:
        raise ConfigError(
            "redundancy=1 and device_bytes do not go together in this version: leave device_bytes out, or redundancy at 0"
        )

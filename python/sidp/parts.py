"""What a pool is put together from, by its plan: transport, ring, the CaS side, and views of every layer."""

from __future__ import annotations

import logging

import torch

from . import cas_cpu, cas_cuda, policy, policy_cuda
from ._native import C
from .control import ControlPlane
from .device import device_bytes
from .dispatch import Dispatch
from .memory import host_bytes
from .pool_plan import PoolPlan
from .shares import Shares, unit_views
from .transport import LocalMemory, ShmTransport
from .transport_cuda import open_gpu_transport
from .transport_gpu import HostTransport

logger = logging.getLogger(__name__)


def open_transport(plan: PoolPlan, control: ControlPlane):
    """This rank's arena; what it needs of the peers comes with its ``connect()``."""
    if not plan.active:
        return LocalMemory(plan.placement.arena_bytes(plan.owner), plan.device)
    sizes = plan.backups.extent_bytes()
    region_bytes = 0 if plan.geometry is None else plan.geometry.bytes
    if not plan.on_gpu:
        return ShmTransport(control, sizes, region_bytes)
    if plan.config.host_tier:
        cuts = [plan.cut(rank) for rank in range(plan.world_size)]
        if not any(cuts):
            return HostTransport(control, sizes, plan.device)
        return open_gpu_transport(control, sizes, plan.device, cuts=cuts)
    transport = open_gpu_transport(control, sizes, plan.device, region_bytes, backups=plan.backups)
    if region_bytes and not transport.region_bytes:
        logger.warning("sidp: CaS is off: no GPU can write to another's memory here")
        plan.geometry = None
    return transport


def make_ring(plan: PoolPlan, transport):
    """The ring of this rank; None on GPUs where it needs none."""
    if plan.on_gpu:
        return _make_gpu_ring(plan, transport)
    return C.Ring(
        plan.placement,
        plan.rank,
        slots=plan.slots,
        peak_shifting=plan.config.peak_shifting,
        paused=ring_waits(plan),
        **transport.ring_arguments(),
    )


def ring_waits(plan: PoolPlan) -> bool:
    """Whether nothing is fetched until a call needs it: in mode "cas" most calls do not."""
    return plan.config.mode == "cas" and plan.geometry is not None


def _make_gpu_ring(plan: PoolPlan, transport):
    if transport.own_is_remote:  # also where host memory is the fallback
        plan.move_to_host()
    if all(plan.local):
        return None
    shifted = plan.config.peak_shifting
    plan.slots = plan.slots or C.default_slots(plan.placement, plan.rank, shifted, plan.local)
    return C.CudaRing(
        plan.placement,
        plan.rank,
        slots=plan.slots,
        peak_shifting=shifted,
        local=plan.local,
        timeout_s=plan.config.timeout_s,
        **transport.ring_arguments(),
    )


def start_cas(plan: PoolPlan, transport, ring) -> Dispatch:
    """This rank's server and requester, and in mode "auto" its policy."""
    chooser = None
    common = (plan.units, plan.placement, plan.rank, plan.geometry, plan.striped)
    chooses = plan.wants_cas and plan.config.mode == "auto"
    arguments = transport.cas_arguments()
    if plan.on_gpu:
        client = cas_cuda.CudaCas(
            *common, plan.local, plan.config.cas_sms, plan.ranks_here, plan.config.timeout_s, arguments
        )
        if chooses:
            chooser = policy_cuda.start(plan, client, transport)
    else:
        blas = C.open_blas(cas_cpu.blas_libraries())
        client = cas_cpu.CpuCas(*common, blas=blas, **arguments)
        if chooses:
            chooser = policy.start(plan, ring, client, blas)
    return Dispatch(plan.config.mode, plan.units, client, chooser, plan.device.type)


def layer_views(plan: PoolPlan, shares: Shares, transport, ring, layer: int) -> dict[str, torch.Tensor]:
    """The layer's tensors at their static addresses: where it lies, or its slot of the ring."""
    if plan.local[layer]:
        return _local_views(plan, shares, transport, layer)
    slot = ring.schedule.slot(ring.schedule.remote_index(layer))
    layout = plan.placement.unit(layer)
    address = ring.slot_address(slot)
    if plan.on_gpu:
        memory = device_bytes(address, layout.bytes, ring, plan.device)
    else:
        memory = host_bytes(address, layout.bytes, ring)
    return unit_views(plan.units[layer], layout.tensors, memory, 0)


def _local_views(plan: PoolPlan, shares: Shares, transport, layer: int) -> dict[str, torch.Tensor]:
    if not (plan.active and plan.on_gpu):
        return shares.whole_unit(layer)
    owner = plan.placement.owner(layer)
    if owner >= 0 and owner != plan.rank:  # on this GPU
        extent, memory = plan.placement.share(layer, owner), transport.extents_of(owner)
        return unit_views(plan.units[layer], extent.pieces, memory, extent.offset)
    views = shares.whole_unit(layer)
    return {name: tensor.to(plan.device) for name, tensor in views.items()}  # a copy in the host tier only

"""What works between these very processes, found by trying it, and chosen alike by all ranks."""

from __future__ import annotations

import logging
import os

from ._native import C
from .control import ControlPlane
from .errors import ConfigError, LayoutError, PeerError, SidpError

logger = logging.getLogger(__name__)

_TRIAL_BYTES = 4096


def choose_shm_kind(control: ControlPlane) -> tuple[str, str]:
    """Collective: how the group's arenas are shared, and why.

    "memfd" has no name anywhere, so nothing can be left behind and /dev/shm may be small; it needs every rank to
    open its peers' /proc/<pid>/fd. Where one rank cannot (another pid namespace, a process that hides
    itself), all ranks take "named": files in /dev/shm that are unlinked once all have mapped them.
    SIDP_SHM_KIND=named asks for that.

    Returns:
        ("memfd", "") or ("named", the reason), the same on all ranks.
    """
    wish = os.environ.get("SIDP_SHM_KIND", "memfd")
    if wish not in ("memfd", "named"):
        raise ConfigError(f"environment variable SIDP_SHM_KIND={wish!r}: expected 'memfd' or 'named'")
    trial, refusal = None, "SIDP_SHM_KIND=named" if wish == "named" else ""
    if not refusal:
        try:
            trial = C.ShmArena(control.rank, control.world_size, control.token, _TRIAL_BYTES)
        except SidpError as error:
            refusal = str(error)
    handles = control.exchange("try memfd", trial.handle() if trial is not None else b"")
    refusals = control.exchange("tried memfd", (refusal or _try_all(control, handles)).encode())
    if trial is not None:
        trial.close()
    for rank, reason in enumerate(refusals):
        if reason:
            text = f"rank {rank}: {reason.decode(errors='replace')}"
            logger.info("sidp: arenas are named files in /dev/shm: %s", text)
            return "named", text
    return "memfd", ""


def _try_all(control: ControlPlane, handles: list[bytes]) -> str:
    """Maps every peer's trial arena and reads its header; why that failed, or nothing."""
    for rank, handle in enumerate(handles):
        if rank == control.rank or not handle:
            continue
        try:
            C.PeerMapping(handle, rank, control.world_size, control.token, _TRIAL_BYTES).close()
        except (PeerError, LayoutError) as error:
            return str(error)
    return ""

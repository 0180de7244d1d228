"""A group that outlives the loss of one rank (docs/protocol_survival.md; the steps have the same numbers there).

The survivors agree without the lost rank, and without the store, which may have died with it: by one word in rank 0's
arena, set once by compare-and-swap. That memory stays with whoever has mapped it, whichever process dies.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import torch

from .backups import BackupPlan
from .config import Unit
from .control import ControlPlane
from .errors import ConfigError, PeerError, SidpError
from .memory import view
from .shares import Index, pieces_of

logger = logging.getLogger(__name__)

Reader = Callable[[int, str, Index], torch.Tensor]
_LOOK_S = 0.02  # between two looks at the words
_GRACE_S = 5.0  # more than the thread may take, for whoever waits for it


class Survival:
    """One rank's part in it, from ``commit`` to ``close``. Its thread deals with a loss while the others compute.

    Args:
        control, transport, placement, units, plan: the pool's, the transport connected.
        reader: ``reader(layer, name, index)`` gives that part of a tensor from its file; for plan.kind "file".

    Attributes:
        lost: the rank that the group goes on without; -1 while there is none.
        recovery_seconds: from the moment this rank knew of the loss until it could go on.
    """

    def __init__(
        self,
        control: ControlPlane,
        transport,
        placement,
        units: list[Unit],
        plan: BackupPlan,
        reader: Reader | None = None,
    ):
        if plan.kind == "file" and reader is None:
            raise ConfigError(
                "backup='file' needs to know the files: load with sidp.from_pretrained, call pool.backup_from(reader) "
                "before commit(), or use backup='peer'"
            )
        self.lost = -1
        self.recovery_seconds = 0.0
        self._control, self._transport, self._placement = control, transport, placement
        self._units, self._plan, self._reader = units, plan, reader
        self._rank = control.rank
        self._verdict = transport.verdict_word()
        self._filled = [transport.filled_word(rank) for rank in range(control.world_size)]
        self._ring = None
        self._error: SidpError | None = None
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- before the group is there ------------------------------------------------------------------------------------

    def copy_from_peers(self) -> None:
        """Except with kind "file": takes the backups over from their owners, whose extents are complete by now."""
        if self._plan.kind == "file":
            return
        memory = self._transport.backups()
        for place in self._plan.places:
            if place.holder == self._rank:
                begin = self._placement.share(place.layer, place.owner).offset
                source = self._transport.extents_of(place.owner)[begin : begin + place.nbytes]
                memory[place.offset : place.offset + place.nbytes].copy_(source)
        if memory.is_cuda:
            torch.cuda.synchronize(memory.device)

    def start(self, ring) -> None:
        """From here on a death is survived. ``ring``: None where every layer is read in place."""
        self._ring = ring
        self._thread = threading.Thread(target=self._run, name="sidp-survival", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_GRACE_S)

    # ---- what a call that met a loss does -----------------------------------------------------------------------------

    def outlive(self, error: PeerError) -> None:
        """Returns once the group goes on without ``error.rank``, so that the caller can try again.

        Raises:
            PeerError: ``error`` itself, or why the group cannot go on: a second loss, or this rank was given up.
        """
        lost, timeout = error.rank, self._control.timeout_s + _GRACE_S
        if lost < 0 or lost >= self._control.world_size:
            raise error
        if lost != self._rank and self._control.watch.state(lost) != "dead":
            self._verdict.set_once(lost + 1)  # it lives and does not answer: given up, if the group agrees
        end = time.monotonic() + timeout
        with self._changed:
            while self.lost != lost and self._error is None:
                left = end - time.monotonic()
                if left <= 0 or self._stopping.is_set():
                    raise error
                self._changed.wait(min(left, 1.0))
        if self._error is not None:
            raise self._error from error

    def reaches(self, owner: int) -> bool:
        """Whether requests can still go to ``owner``; -1 stands for all ranks together."""
        return self.lost < 0 or (owner >= 0 and owner != self.lost)

    # ---- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping.wait(_LOOK_S):
                lost = self._control.watch.dead_rank()
                if lost < 0 and self._verdict.load() != self.lost + 1:
                    lost = self._verdict.load() - 1
                if lost >= 0:
                    self._go_on_without(lost)
        except SidpError as error:
            self._fail(error)
        except Exception as error:  # a reader of files raises what it likes; whoever waits must hear of it
            logger.exception("sidp: the loss of a rank could not be made good")
            self._fail(
                PeerError(
                    f"the lost weights could not be restored: {type(error).__name__}: {error}", self._verdict.load() - 1
                )
            )

    def _go_on_without(self, lost: int) -> None:
        begin = time.monotonic()
        self._agree(lost)  # L2
        self._control.watch.lose(lost)
        places = self._plan.of(lost)
        self._fill(lost)  # L3
        self._wait_filled(lost, {place.holder for place in places})  # L4
        if places and self._ring is not None:
            share, area = self._placement.share, self._transport.backup_area
            self._ring.move_extents(
                lost, [(p.layer, area(p.holder), share(p.layer, lost).offset, p.offset) for p in places]
            )  # L5
        self._control.watch.go_on_without(lost)  # L6
        with self._changed:
            self.lost, self.recovery_seconds = lost, time.monotonic() - begin
            self._changed.notify_all()
        logger.warning(
            "sidp: rank %d was lost; the group goes on without it, from its backups (%s), after %.0f ms",
            lost,
            self._plan.kind,
            1e3 * self.recovery_seconds,
        )

    def _agree(self, lost: int) -> None:
        agreed = self._verdict.set_once(lost + 1) - 1
        if agreed == self._rank:
            self._control.watch.lose(self._rank)
            raise PeerError(
                f"this rank ({self._rank}) did not answer for longer than the others' timeout, and the group goes on "
                f"without it: end this process",
                self._rank,
            )
        if agreed != lost:
            raise PeerError(
                f"rank {lost} was lost after rank {agreed}: redundancy=1 survives one loss; start the group again", lost
            )

    def _fill(self, lost: int) -> None:
        """With kind "file": this rank's part of the lost extents, read again from their files."""
        if self._plan.kind != "file":
            return
        memory = self._transport.extents()
        for place in self._plan.of(lost):
            if place.holder != self._rank:
                continue
            unit = self._units[place.layer]
            for name, index, shape, dtype, offset in pieces_of(unit, self._placement.share(place.layer, lost)):
                part = self._reader(place.layer, name, index)
                if tuple(part.shape) != shape:
                    raise PeerError(
                        f"'{name}' of layer {place.layer} has {tuple(part.shape)} in its file now, not {shape}", lost
                    )
                view(memory, place.offset + offset, shape, dtype).copy_(part)
        self._filled[self._rank].store(lost + 1)

    def _wait_filled(self, lost: int, holders: set[int]) -> None:
        if self._plan.kind != "file":
            return
        end = time.monotonic() + self._control.timeout_s
        while waiting := [rank for rank in sorted(holders) if self._filled[rank].load() != lost + 1]:
            gone = [rank for rank in waiting if not self._transport.takes_part(rank)]
            if gone or time.monotonic() > end:
                rank = (gone or waiting)[0]
                raise PeerError(
                    f"rank {rank} was to restore a part of rank {lost}'s weights and {'is gone too' if gone else 'is late'}: "
                    f"redundancy=1 survives one loss; start the group again",
                    rank,
                )
            if self._stopping.wait(_LOOK_S):
                return

    def _fail(self, error: SidpError) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

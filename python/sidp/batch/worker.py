"""One rank of a run: load, take requests from the board, generate, settle each answer, serve the pool to the end."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from dataclasses import asdict, dataclass
from typing import Any

from ..config import PoolConfig
from .queue import Board
from .records import BadRow, Request
from .responses import Answer, error_line, success_line
from .spool import Spool
from .writer import Output, written_keys

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_IDLE_S = 0.2
_TAIL = 0.05  # of the requests


@dataclass(frozen=True)
class Job:
    """What every rank is told; plain values, since it travels as JSON. `model` None: the tiny random one."""

    model: str | None
    load_format: str
    model_name: str
    board: str
    spool: str
    output: str
    pooled: bool
    pool_config: dict[str, Any]
    backend: str
    dtype: str
    batching: str
    max_batch: int | None
    kv_bytes: int | None
    utilization: float
    batch_tokens: int | None
    group: int
    samples: bool
    filters: bool
    mean_cost: int
    graphs: bool = True

    @property
    def survives(self) -> bool:
        """Whether ranks go on when another one dies."""
        return not self.pooled or PoolConfig(**self.pool_config).redundancy > 0

    @property
    def may_send_from_graphs(self) -> bool:
        """Whether a captured step may take CaS, for which kernels must be loaded at the start (policy_cuda.py)."""
        config = PoolConfig(**self.pool_config)
        sends = config.mode in ("auto", "cas") and not config.redundancy  # with backups "auto" takes WaS on GPUs
        return self.graphs and self.pooled and self.backend != "cpu" and sends

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Job:
        return cls(**json.loads(text))


def serve(context: Any, job: Job) -> None:
    """Collective in a pooled run. Raises SidpError; what was settled until then is in the output."""
    if job.may_send_from_graphs and _devices() > 1:  # on one GPU the ranks read each other's layers in place
        os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    if job.backend != "cpu" and "PYTORCH_ALLOC_CONF" not in os.environ:
        # A model of many tensors of a few MB would else leave gaps in torch's segments: 150 MB of KV cache for 8B.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    board = Board(job.board)
    board.join(context.rank)
    with contextlib.ExitStack() as stack:
        stack.callback(board.close)
        begin = time.monotonic()
        from .loading import load

        loaded = load(job, context.rank)
        if loaded.pool is not None:
            stack.enter_context(loaded.pool)  # closed last: it serves the others until all are done
        with contextlib.closing(loaded.make_engine(board)) as engine:
            board.report(
                ready=1,
                load_seconds=time.monotonic() - begin,
                kv_capacity=engine.kv_capacity,
                request_limit=engine.request_limit,
            )
            spool, output = Spool(job.spool), Output(job.output, board.lock)
            stack.callback(spool.close)
            stack.callback(output.close)
            _Loop(job, board, spool, output, loaded, engine).run()
        # Before the pool closes, which waits for the others: this rank has done its part.
        board.report(finished=1, running=0, waiting=0, kv_tokens=0)


def _devices() -> int:
    """GPUs, counted without CUDA: it looks at its environment at its first call."""
    import torch

    return torch.cuda.device_count() if torch.version.cuda else 0


class _Loop:
    def __init__(self, job: Job, board: Board, spool: Spool, output: Output, loaded, engine) -> None:
        self.job, self.board, self.spool, self.output = job, board, spool, output
        self.codec, self.pool, self.engine = loaded.codec, loaded.pool, engine
        self._begin = 0.0
        self._prompt_tokens = 0
        self._in_tail = False

    def run(self) -> None:
        self._begin = time.monotonic()
        self.board.report(first_taken=time.time())
        while True:
            took = self._feed()
            if self.engine.in_flight:
                for finished in self.engine.poll(_POLL_S):
                    self._settle(finished)
                self._report(busy=True)
            elif not took and self._nothing_left():
                break
        self._report(busy=False)

    def _feed(self) -> bool:
        """Take what the engine has room for; True where the board gave something."""
        items = self.board.take(self._wish(), self.engine.fitting)
        tickets = [ticket for item in items if (ticket := self._ticket(item)) is not None]
        if tickets:
            self.engine.submit(tickets)
        return bool(items)

    def _wish(self) -> int:
        room = self.engine.room()
        if room <= 0 or self.engine.grouped:
            return min(room, self.job.group)
        # No more than a fair part of what is left in the whole run, so that the end is shared too.
        counts = self.board.counts()
        fair = math.ceil((counts["free"] + counts["taken"]) / self.board.world_size)
        return min(room, fair - self.engine.in_flight)

    def _ticket(self, item: int):
        """The item as the engine takes it; None where it was answered with an error right away."""
        from .engine import Ticket

        request = self.spool.request(self.board.extent(item))
        try:
            prompt = self.codec.encode(request)
            limit = self.codec.limit(request, len(prompt), self.engine.kv_capacity)
        except BadRow as error:
            self._refuse(item, request, error, 400)
            return None
        return Ticket(item, request, prompt, limit)

    def _settle(self, finished) -> None:
        ticket = finished.ticket
        if finished.error is not None:
            self._refuse(ticket.item, ticket.request, BadRow(finished.error, None, "server_error"), 500)
            return
        text, reason = self.codec.answer(ticket.request, finished.tokens)
        answer = Answer(text, reason, len(ticket.prompt), len(finished.tokens))
        line = success_line(ticket.request, answer, self.job.model_name)
        if self.board.settle(ticket.item, lambda: self.output.append_locked(line)):
            self._prompt_tokens += len(ticket.prompt)
            self.board.add(succeeded=1, **{f"finished_{reason}": 1})
            self._note_time()

    def _note_time(self) -> None:
        """When the last answer came, and since when fewer than a part of the requests are left: the run's tail."""
        now = time.time()
        self.board.report(last_settled=now)
        if not self._in_tail and self.board.items - self.board.answered() < _TAIL * self.board.items:
            self.board.report(tail_began=now)
            self._in_tail = True

    def _refuse(self, item: int, request: Request, error: BadRow, status: int) -> None:
        line = error_line(request.key, request.custom_id, error, status)
        if self.board.settle(item, lambda: self.output.append_locked(line)):
            self.board.add(failed=1)

    def _nothing_left(self) -> bool:
        """True once this rank can end: in a pooled run when nothing is free, else when everything is answered.

        A rank that outlives its peers waits for their requests in case they die. Without backups their death is the end
        of this rank as well, which the pool reports.
        """
        counts = self.board.counts()
        if counts["free"]:
            return False
        if self.pool is not None and self.pool.active and not self.job.survives:
            return True
        if not counts["taken"]:
            return True
        for item in self.board.reap(self._keys, lambda: written_keys(self.job.output)):
            request = self.spool.request(self.board.extent(item))
            text = "every rank that worked on this request died; is there enough memory for it?"
            self._refuse(item, request, BadRow(text, None, "server_error"), 500)
        time.sleep(_IDLE_S)
        return False

    def _keys(self, items: list[int]) -> list[str]:
        return [self.spool.request(self.board.extent(item)).key for item in items]

    def _report(self, busy: bool) -> None:
        figures = self.engine.figures()
        row = self.board.rank_figures(self.board.rank)
        self.board.report(
            **figures,
            prompt_tokens=self._prompt_tokens,
            peak_running=max(row["peak_running"], figures["running"]),
            kv_peak=max(row["kv_peak"], figures["kv_tokens"]),
            **self.engine.step_figures,
        )
        if busy:
            self.board.report(busy_seconds=time.monotonic() - self._begin)
        if self.pool is not None:
            self.board.report(**pool_figures(self.pool, self.engine.replayed_calls))


def pool_figures(pool, replayed: dict[str, int]) -> dict[str, float]:
    """The pool's statistics under the board's names; `replayed` are calls that it did not see."""
    stats = pool.stats()
    calls = {f"calls_{mode}": stats.calls.get(mode, 0) + replayed.get(mode, 0) for mode in ("local", "was", "cas")}
    return calls | {
        "stalls": stats.stalls,
        "stall_seconds": stats.stall_seconds,
        "fetched_bytes": stats.fetched_bytes,
        "owned_bytes": stats.owned_bytes,
        "ring_bytes": stats.ring_bytes,
        "freed_bytes": stats.freed_bytes,
        "replicated_bytes": stats.replicated_bytes,
        "pool_active": float(stats.active),
    }

"""How a rank generates: one interface, two engines.

`PagedEngine` is transformers' continuous batching: a paged KV cache sized from what memory is left, requests joining
and leaving the running batch at every step. `PaddedEngine` (padded.py) is plain `generate`, for models that the
former refuses.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, SidpError
from . import attention, decode
from .memory import kv_bytes_per_token
from .paged import batching_config, install_sampling, page_of, queue_all, request_state
from .records import Request
from .text import Codec

logger = logging.getLogger(__name__)

_STOP_S = 30.0  # how long a generation thread may take to end after its last step
_PAGE = 32
_FLASH_ATTN_PAGE = 256  # its kernel for paged caches takes no smaller ones
_CPU_BATCH_TOKENS, _CUDA_BATCH_TOKENS = 512, 2048  # the latter is enough to be bound by arithmetic
_CPU_KV_BYTES = 512 << 20  # what is free on a host is not ours to take
_QUEUED_AHEAD = 8  # requests the engine holds beyond what it runs, at least: a step never waits for the board
_MOST_REQUESTS = 16384


@dataclass(frozen=True)
class Ticket:
    """A request on its way through an engine. `limit`: tokens to generate at most."""

    item: int
    request: Request
    prompt: list[int]
    limit: int


@dataclass(frozen=True)
class Finished:
    """`tokens` generated, end token included; `error` says why there are none to use."""

    ticket: Ticket
    tokens: list[int]
    error: str | None = None


@dataclass(frozen=True)
class EngineOptions:
    """`grouped`: requests run in fixed groups, so that no token depends on timing. `max_batch` None: what the KV
    cache holds. `kv_bytes` is the KV cache's size; `batch_tokens` None takes the device's default. `graphs`: decode steps
    are captured in CUDA graphs where that can be done.
    """

    grouped: bool
    max_batch: int | None
    kv_bytes: int
    samples: bool
    filters: bool
    mean_cost: int
    batch_tokens: int | None = None
    graphs: bool = True


def default_batch_tokens(device: torch.device) -> int:
    """Rows of a step at most."""
    return _CUDA_BATCH_TOKENS if device.type == "cuda" else _CPU_BATCH_TOKENS


def page_tokens(model) -> int:
    """Tokens of a page of its KV cache."""
    if decode.in_place(model):
        return attention.DECODE_PAGE
    return _FLASH_ATTN_PAGE if attention.kind(model) == "package" else _PAGE


class PagedEngine:
    """Continuous batching. The KV cache is allocated here: whatever else needs memory must have it by now.

    Raises ConfigError where transformers cannot run this model so.
    """

    def __init__(self, model, codec: Codec, options: EngineOptions, pool=None) -> None:
        self._codec = codec
        self._options = options
        self._tickets: dict[str, Ticket] = {}
        self._reserved = 0  # pages that the requests in flight will hold at their ends
        self._failed: BaseException | None = None
        self.grouped = options.grouped
        self.preemptions = 0
        self.output_tokens = 0
        self._batch_tokens = options.batch_tokens or default_batch_tokens(model.device)
        self._page = page_tokens(model)
        self.request_limit = min(_request_limit(model, self._page, options), self._batch_tokens)
        self._ahead = max(_QUEUED_AHEAD, 2 * self._batch_tokens // max(1, options.mean_cost))  # more than a step takes
        try:
            self._manager = self._make_manager(model)
            in_place = decode.in_place(model)
            if in_place:
                decode.prepare(self._manager, self._page)
            self._manager.warmup()  # allocates the cache
            self._steps = None
            if in_place:
                self._steps = decode.DecodeSteps(self._manager, pool, self._page, options.graphs, options.grouped)
        except (ImportError, AttributeError, TypeError, ValueError, KeyError, MemoryError) as error:
            raise ConfigError(
                f"transformers' continuous batching cannot run this model here ({type(error).__name__}: {error}); try "
                "--batching padded"
            ) from error
        # Requests join a step's worth of prompts at a time: a step with a prompt in it is no pure decode step.
        self._joining = 1
        if self._steps is not None:
            self._joining = max(1, min(self._batch_tokens // max(1, options.mean_cost), self.request_limit // 8))
        cache = self._manager.batch_processor.cache
        self._page, self._pages = page_of(self._manager.continuous_batching_config), int(cache.num_blocks)
        self.kv_capacity = self._pages * self._page
        self._manager.start()

    def _make_manager(self, model):
        from transformers import GenerationConfig

        if attention.kind(model) == "torch":
            attention.use_torch_flash(model)
        config = batching_config(
            self._page,
            num_blocks=max(2, self._options.kv_bytes // (kv_bytes_per_token(model) * self._page)),
            max_batch_tokens=self._batch_tokens,
            max_requests_per_batch=self.request_limit,
            max_memory_percent=1.0,  # how much there is to take was decided for all ranks of the device (memory.py)
            # A shared prefix is computed once, in whichever batch came first: tokens would depend on timing.
            allow_block_sharing=not self._options.grouped,
            safety_margin=0.0,  # the request limit keeps the cache from overflowing
            use_async_batching=self._options.graphs and model.device.type == "cuda" and decode.in_place(model),
            use_cuda_graph=False,  # decode.py has its own
        )
        # Ends and limits are per request; do_sample=False since sampling is ours (sampling.py).
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
        manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=config)
        if self._options.samples:
            install_sampling(manager, self._options.filters)
        return manager

    # ---- requests -------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        return len(self._tickets)

    def room(self) -> int:
        """How many more requests the engine wants now."""
        free = self.request_limit - len(self._tickets)
        if self.grouped:
            return free if not self._tickets else 0
        if self._tickets and free < self._joining:
            return 0
        return min(free, self._ahead - self._waiting())

    def fitting(self, costs: np.ndarray) -> int:
        """How many requests of so many tokens, in this order, the KV cache has room for beside those in flight, at their ends.

        transformers' engine looks at prompts alone when it admits a request, and later throws out those that find no page.
        A fixed group is taken whole, in turns if it must be.
        """
        if self.grouped:
            return len(costs)
        count = int(np.searchsorted(np.cumsum(self._pages_for(costs)), self._pages - self._reserved, side="right"))
        return 0 if self._tickets and count < min(self._joining, len(costs)) else count

    def _pages_of(self, ticket: Ticket) -> int:
        """Pages at its end; an answer without a limit of its own, as `Request.cost` has it, counts for nothing."""
        tokens = len(ticket.prompt) + (ticket.limit if ticket.request.max_tokens else 0)
        return int(self._pages_for(tokens))

    def _pages_for(self, tokens: np.ndarray | int) -> np.ndarray:
        """No more than there are: longer requests are refused before they run."""
        return np.minimum(-(-tokens // self._page), self._pages)

    def submit(self, tickets: list[Ticket]) -> None:
        """Queue requests; in grouped mode all of them start in the same step."""
        states = []
        for ticket in tickets:
            key = str(ticket.item)
            self._tickets[key] = ticket
            self._reserved += self._pages_of(ticket)
            states.append(request_state(self, key, ticket, self._codec))
        queue_all(self._manager, states)

    def poll(self, timeout_s: float) -> list[Finished]:
        """What finished since the last call; waits up to `timeout_s` for the first. Raises what ended the engine."""
        finished = []
        with contextlib.suppress(queue.Empty):
            for output in self._outputs(timeout_s):
                ticket = self._tickets.pop(output.request_id, None)
                if ticket is not None:
                    self._reserved -= self._pages_of(ticket)
                    finished.append(Finished(ticket, list(output.generated_tokens), output.error))
        if self._manager.background_thread_status.local_status != 0 and any(f.error for f in finished):
            self._wait_for_end()
            # The others are fine; those that failed with the engine are nobody's fault and not to be answered.
            finished = [f for f in finished if f.error is None]
        if not finished:
            self._raise_if_ended()
        return finished

    def _outputs(self, timeout_s: float) -> Iterator[Any]:
        outputs = self._manager.output_router.output_queue
        output = outputs.get(timeout=timeout_s)
        while True:
            if output.is_finished():
                yield output
            output = outputs.get_nowait()

    def _wait_for_end(self) -> None:
        end = time.monotonic() + _STOP_S
        while self._manager.is_running() and time.monotonic() < end:
            time.sleep(0.01)

    def _raise_if_ended(self) -> None:
        fatal = self._manager.background_thread_status.fatal_error
        if fatal is not None:
            if isinstance(fatal, SidpError):
                raise fatal
            raise SidpError(f"the engine stopped: {type(fatal).__name__}: {fatal}") from fatal
        if not self._manager.is_running():
            raise SidpError("the engine's thread ended without a word")

    # ---- figures --------------------------------------------------------------------------------------------------

    def _waiting(self) -> int:
        return self._manager.input_queue.qsize() + len(self._manager.batch_processor.scheduler.waiting_requests)

    def figures(self) -> dict[str, float]:
        """Requests running and waiting, tokens in the KV cache, preemptions, tokens generated."""
        active = list(self._manager.batch_processor.scheduler.active_requests.values())
        return {
            "running": len(active),
            "waiting": self._waiting(),
            "kv_tokens": sum(state.current_len() for state in active),
            "preemptions": self.preemptions,
            "output_tokens": self.output_tokens,
        }

    def close(self) -> None:
        """Ends the generation thread after its current step; requests in flight are dropped."""
        self._manager.stop(block=True, timeout=_STOP_S, hard_stop=True)
        if self._steps is not None:
            self._steps.close()

    @property
    def step_figures(self) -> dict[str, float]:
        """Steps and seconds by kind, and modes that were compared (decode.py), where the engine keeps decode steps apart."""
        return {} if self._steps is None else self._steps.figures()

    @property
    def replayed_calls(self) -> dict[str, int]:
        """FFN calls by mode that CUDA graphs made, which the pool did not see."""
        return {} if self._steps is None else dict(self._steps.calls)


def _request_limit(model, page: int, options: EngineOptions) -> int:
    """Requests in one batch: as many of the mean length as the KV cache holds, and no more than was asked for.

    A fixed group is run whole, in turns where the cache is too small for it.
    """
    if options.grouped and options.max_batch is not None:
        return options.max_batch
    pages = options.kv_bytes // (kv_bytes_per_token(model) * page)
    of_request = -(-options.mean_cost // page)
    return min(options.max_batch or _MOST_REQUESTS, max(1, pages // of_request))


def default_kv_bytes() -> int:
    """Of a rank that computes on the CPU."""
    return _CPU_KV_BYTES

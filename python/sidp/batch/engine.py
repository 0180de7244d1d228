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
from typing import Any, ClassVar

import torch

from ..errors import ConfigError, SidpError
from .records import Request
from .sampling import gumbel_noise, keep_likeliest, row_sampling
from .text import Codec

logger = logging.getLogger(__name__)

_STOP_S = 30.0  # how long a generation thread may take to end after its last step
_CPU_BATCH_TOKENS, _CPU_PAGE = 512, 32
_CUDA_BATCH_TOKENS, _CUDA_PAGE = 8192, 256
_CPU_KV_BYTES = 512 << 20
_QUEUED_AHEAD = 8  # requests the engine holds beyond what it runs, so that a step never waits for the board
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
    cache holds.
    """

    grouped: bool
    max_batch: int | None
    kv_bytes: int | None
    samples: bool
    filters: bool
    mean_cost: int


def kv_bytes_per_token(model) -> int:
    """Keys and values of one token in every layer, bytes, in the model's dtype."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize


class PagedEngine:
    """Continuous batching. The KV cache is allocated here: whatever else needs memory must have it by now.

    Raises ConfigError where transformers cannot run this model so.
    """

    def __init__(self, model, codec: Codec, options: EngineOptions) -> None:
        self._codec = codec
        self._options = options
        self._tickets: dict[str, Ticket] = {}
        self._failed: BaseException | None = None
        self.grouped = options.grouped
        self.preemptions = 0
        self.output_tokens = 0
        self.request_limit = _request_limit(model, options)
        try:
            self._manager = self._make_manager(model)
            self._manager.warmup()  # allocates the cache; captures graphs where the device has them
        except (ImportError, AttributeError, TypeError, ValueError, KeyError, MemoryError) as error:
            raise ConfigError(
                f"transformers' continuous batching cannot run this model here ({type(error).__name__}: {error}); try "
                "--batching padded"
            ) from error
        cache = self._manager.batch_processor.cache
        self.kv_capacity = int(cache.num_blocks * self._manager.continuous_batching_config.page_size)
        self._manager.start()

    def _make_manager(self, model):
        from transformers import ContinuousBatchingConfig, GenerationConfig

        cuda = model.device.type == "cuda"
        page = _CUDA_PAGE if cuda else _CPU_PAGE
        budget = self._options.kv_bytes
        if budget is None and not cuda:
            budget = _CPU_KV_BYTES  # what is free on a host is not ours to take
        blocks = None if budget is None else max(2, budget // (kv_bytes_per_token(model) * page))
        config = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=blocks,
            max_batch_tokens=_CUDA_BATCH_TOKENS if cuda else _CPU_BATCH_TOKENS,
            max_requests_per_batch=self.request_limit,
            # A shared prefix is computed once, in whichever batch came first: tokens would depend on timing.
            allow_block_sharing=not self._options.grouped,
            use_async_batching=False if self._options.samples else None,
        )
        # Ends and limits are per request; do_sample=False since sampling is ours (sampling.py).
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
        manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=config)
        _install_sampling(manager, self._options)
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
        return min(free, _QUEUED_AHEAD - self._waiting())

    def submit(self, tickets: list[Ticket]) -> None:
        """Queue requests; in grouped mode all of them start in the same step."""
        # While the loop pauses it takes nothing from its queue.
        with self._manager.pause() if self.grouped and tickets else contextlib.nullcontext():
            for ticket in tickets:
                key = str(ticket.item)
                self._tickets[key] = ticket
                self._manager.input_queue.put(_state(self, key, ticket, self._codec))
        self._manager._wake_up_loop.set()

    def poll(self, timeout_s: float) -> list[Finished]:
        """What finished since the last call; waits up to `timeout_s` for the first. Raises what ended the engine."""
        finished = []
        with contextlib.suppress(queue.Empty):
            for output in self._outputs(timeout_s):
                ticket = self._tickets.pop(output.request_id, None)
                if ticket is not None:
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


def _request_limit(model, options: EngineOptions) -> int:
    """Requests in one batch: what was asked for, else as many of the mean length as the KV cache will hold, about."""
    if options.max_batch is not None:
        return options.max_batch
    free = options.kv_bytes
    if free is None:
        free = torch.cuda.mem_get_info(model.device)[0] * 0.8 if model.device.type == "cuda" else _CPU_KV_BYTES
    tokens = free / kv_bytes_per_token(model)
    return int(min(_MOST_REQUESTS, max(1, tokens / max(1, options.mean_cost))))


def _state(engine: PagedEngine, key: str, ticket: Ticket, codec: Codec):
    """The engine's own record of a request, which ends at stop strings too, in the very step that completes one."""
    from transformers.generation.continuous_batching.requests import RequestState

    finder = codec.finder(ticket.request)

    class State(RequestState):
        def update_and_check_completion(self, token_id, logprob):
            done = super().update_and_check_completion(token_id, logprob)
            engine.output_tokens += 1
            if not done and finder is not None and finder.found(self._all_generated()):
                self.status = type(self.status).FINISHED
                return True
            return done

        def create_equivalent_initial_request(self):
            again = super().create_equivalent_initial_request()
            again.__class__ = State
            engine.preemptions += 1
            return again

        def _all_generated(self):
            before = self.initial_tokens[self._true_initial_tokens :] if self._true_initial_tokens else []
            return before + self.generated_tokens

    state = State(
        request_id=key,
        initial_tokens=list(ticket.prompt),
        max_new_tokens=ticket.limit,
        eos_token_id=[] if ticket.request.ignore_eos else sorted(codec.end_tokens),
    )
    state.sampling_request = ticket.request
    return state


def _install_sampling(manager, options: EngineOptions) -> None:
    """Give the engine our per-request sampling; a job of greedy requests needs none and gets none."""
    if not options.samples:
        return
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

    class Column(ContinuousBatchingLogitsProcessor):
        """One 32-bit value a row, taken from its RowSampling; the last column does the work with all of them."""

        supported_kwargs: ClassVar[dict[str, type]] = {}
        ignored_kwargs: ClassVar[tuple[str, ...]] = ()

        def __init__(self, name, dtype, neutral, finish=None):
            self.name, self.dtype, self.neutral, self.finish = name, dtype, neutral, finish
            self.values = None

        def fill_defaults(self, int32_tensor):
            int32_tensor.copy_(torch.full_like(int32_tensor, self.neutral, dtype=self.dtype).view(torch.int32))

        def prepare_tensor_args(self, requests_with_new_token):
            rows = [_sampling_of(future.state) for future in requests_with_new_token]
            return torch.tensor([getattr(row, self.name) for row in rows], dtype=self.dtype).view(torch.int32)

        def __call__(self, scores, tensor_arg):
            self.values = tensor_arg[: scores.shape[0]].view(self.dtype)
            return scores if self.finish is None else self.finish(scores)

    temperature = Column("temperature", torch.float32, 1.0)
    top_p, top_k = Column("top_p", torch.float32, 1.0), Column("top_k", torch.int32, 0)

    def draw(scores):
        scores = scores / temperature.values.unsqueeze(1)
        if options.filters:
            scores = keep_likeliest(scores, top_p.values, top_k.values)
        return scores + gumbel_noise(word.values, scores.shape[1])

    word = Column("word", torch.int32, 0, draw)
    columns = [temperature, *([top_p, top_k] if options.filters else []), word]
    processors = manager.logit_processor
    processors.logits_processor.extend(columns)
    processors.tensors_required += len(columns)
    processors.do_processing = True


def _sampling_of(state):
    request = getattr(state, "sampling_request", None)
    if request is None:  # the engine's own warm-up requests
        return row_sampling(_GREEDY_REQUEST, 0)
    return row_sampling(request, state.position_offset)


_GREEDY_REQUEST = Request("", "", "", "", None, None, 1, True, 0.0, 1.0, 0, 0, (), False)

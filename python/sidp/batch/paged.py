"""What sidp puts into transformers' continuous batching: requests that end at stop strings, and sampling by request."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .records import Request
from .sampling import gumbel_noise, keep_likeliest, row_sampling
from .text import Codec


def batching_config(page: int, **fields: Any):
    """transformers' configuration of the engine, with pages of `page` tokens, which older releases call blocks."""
    from transformers import ContinuousBatchingConfig

    known = ContinuousBatchingConfig.__dataclass_fields__
    return ContinuousBatchingConfig(**{"page_size" if "page_size" in known else "block_size": page}, **fields)


def page_of(config: Any) -> int:
    """Tokens of a page."""
    return config.page_size if hasattr(config, "page_size") else config.block_size


def queue_all(manager: Any, states: list[Any]) -> None:
    """Hand requests to the engine's loop, which finds either none or all of them at its next step."""
    waiting = manager.input_queue
    with waiting.mutex:
        waiting.queue.extend(states)
        waiting.unfinished_tasks += len(states)
        waiting.not_empty.notify()
    wake = getattr(manager, "_wake_up_loop", None) or manager._has_new_requests
    wake.set()


def request_state(engine: Any, key: str, ticket: Any, codec: Codec):
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
            again.sampling_request = self.sampling_request
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


def install_sampling(manager: Any, filters: bool) -> None:
    """Give the engine our per-request sampling; `filters`: some request has top_p or top_k, which costs a sort."""
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
        if filters:
            scores = keep_likeliest(scores, top_p.values, top_k.values)
        return scores + gumbel_noise(word.values, scores.shape[1])

    word = Column("word", torch.int32, 0, draw)
    columns = [temperature, *([top_p, top_k] if filters else []), word]
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

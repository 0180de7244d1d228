"""The plain engine: `generate` on one padded batch at a time, for models that continuous batching refuses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from .engine import EngineOptions, Finished, Ticket
from .memory import kv_bytes_per_token
from .sampling import choose, row_sampling
from .text import Codec

_KV_FRACTION = 0.5  # on a GPU generate's cache grows by copies, and takes twice its size for a moment


class PaddedEngine:
    """Runs what was submitted as one batch, padded on the left, when it is polled."""

    grouped = True

    def __init__(self, model, codec: Codec, options: EngineOptions) -> None:
        self._model, self._codec = model, codec
        self._batch: list[Ticket] = []
        self._samples = options.samples
        self.request_limit = options.max_batch or 8
        part = _KV_FRACTION if model.device.type == "cuda" else 1.0
        self.kv_capacity = max(1, int(options.kv_bytes * part) // kv_bytes_per_token(model))
        self.output_tokens = 0

    @property
    def in_flight(self) -> int:
        return len(self._batch)

    def room(self) -> int:
        return 0 if self._batch else self.request_limit

    def fitting(self, costs: Sequence[int]) -> int:
        return len(costs)

    def submit(self, tickets: list[Ticket]) -> None:
        self._batch.extend(tickets)

    def poll(self, timeout_s: float) -> list[Finished]:
        """Runs the batch to its end, whatever `timeout_s` says."""
        batch, self._batch = self._batch, []
        return self._run(batch) if batch else []

    def figures(self) -> dict[str, float]:
        return {"running": len(self._batch), "waiting": 0, "kv_tokens": 0, "preemptions": 0,
                "output_tokens": self.output_tokens}  # fmt: skip

    def close(self) -> None:
        self._batch = []

    @property
    def step_figures(self) -> dict[str, float]:
        return {}

    @property
    def replayed_calls(self) -> dict[str, int]:
        return {}

    @torch.inference_mode()
    def _run(self, batch: list[Ticket]) -> list[Finished]:
        width = max(len(ticket.prompt) for ticket in batch)
        device = self._model.device
        ids = torch.tensor([[0] * (width - len(t.prompt)) + t.prompt for t in batch], device=device)
        mask = torch.tensor([[0] * (width - len(t.prompt)) + [1] * len(t.prompt) for t in batch], device=device)
        ends = _Ends(self, batch, self._codec, width)
        # Ends are ours, by row; an end token of the model's own configuration would end rows that ignore it.
        longest = max(ticket.limit for ticket in batch)
        generation = GenerationConfig(do_sample=False, max_new_tokens=longest, pad_token_id=0, eos_token_id=-1)
        generation.eos_token_id = None
        self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=generation,
            logits_processor=LogitsProcessorList([_Draw(batch, width)] if self._samples else []),
            stopping_criteria=StoppingCriteriaList([ends]),
        )
        return [Finished(ticket, tokens) for ticket, tokens in zip(batch, ends.tokens, strict=True)]


class _Ends:
    """Each row's own end: its limit, an end token, a stop string. Keeps the tokens up to there."""

    def __init__(self, engine: PaddedEngine, batch: list[Ticket], codec: Codec, width: int) -> None:
        self._engine, self._batch, self._codec, self._width = engine, batch, codec, width
        self._finders = [codec.finder(ticket.request) for ticket in batch]
        self._done = [False] * len(batch)
        self.tokens: list[list[int]] = [[] for _ in batch]

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self._done[row]:
                continue
            ticket, tokens, finder = self._batch[row], self.tokens[row], self._finders[row]
            tokens.append(token)
            self._engine.output_tokens += 1
            ended = token in self._codec.end_tokens and not ticket.request.ignore_eos
            full = len(tokens) >= ticket.limit
            self._done[row] = ended or full or (finder is not None and finder.found(tokens))
        return torch.tensor(self._done, device=input_ids.device)


class _Draw:
    """Makes the drawn token the most likely one."""

    def __init__(self, batch: list[Ticket], width: int) -> None:
        self._batch, self._width = batch, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        generated = input_ids.shape[1] - self._width
        rows = [row_sampling(ticket.request, len(ticket.prompt) + generated) for ticket in self._batch]
        return choose(scores, rows)

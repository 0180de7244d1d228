"""What one rank of `sidp demo` does: serve its share of the prompts over the pool, then check every token."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ..launch import RankContext
from .models import ModelSource, random_model
from .prompts import Prompt

_RANDOM_PROMPT_BYTES = 64  # the random model reads bytes; a long prompt would only cost time


@dataclass(frozen=True)
class Job:
    """What every rank is asked to do; the same for all, each takes `prompts[rank::world_size]`."""

    model: ModelSource
    prompts: tuple[Prompt, ...]
    batch_size: int
    max_new_tokens: int
    placement: str
    slots: int | None
    verify: bool
    trace_rank: int | None  # the rank whose timeline is recorded, None for none


@dataclass(frozen=True)
class Answer:
    """One prompt's generated tokens, the end token included."""

    prompt: int
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Run:
    """One pass over a rank's prompts: its answers and the seconds from the first batch to the last."""

    answers: tuple[Answer, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)


@dataclass(frozen=True)
class RankReport:
    """A rank's result; plain values, so that it travels to the parent and into JSON."""

    rank: int
    stats: dict[str, Any]
    pooled: Run
    unpooled: Run | None
    kv_bytes_per_token: int
    active: bool
    reason: str
    layers: int
    trace: list[tuple] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """`tokens` newly generated in `phase`; `unspent` is what a finished batch did not need of its limit."""

    phase: str
    tokens: int
    unspent: int = 0


class _Counter:
    """A streamer for `generate` that reports each step's tokens of the rows that have not ended."""

    def __init__(self, rows: int, end_tokens: set[int], report) -> None:
        self._alive = [True] * rows
        self._end_tokens = end_tokens
        self._report = report
        self._prompt_seen = False

    def put(self, value) -> None:
        if not self._prompt_seen:  # generate hands over the prompt first
            self._prompt_seen = True
            return
        self._report(sum(self._alive))
        for row, token in enumerate(value.reshape(-1).tolist()):
            self._alive[row] = self._alive[row] and token not in self._end_tokens

    def end(self) -> None:
        pass


def serve(context: RankContext, job: Job) -> RankReport:
    """Collective: every rank of the launch calls it. Raises SidpError as the pool does."""
    _quiet()
    import torch.distributed as dist

    import sidp

    tokenizer = _tokenizer(job.model)
    config = sidp.PoolConfig(mode="was", placement=job.placement, slots=job.slots)
    pool, model = _pooled_model(job.model, config)
    mine = list(range(context.rank, len(job.prompts), context.world_size))
    try:
        _warm_up(job, model, tokenizer, mine)
        before = pool_figures(pool)
        if job.trace_rank == context.rank:
            pool.start_trace()
        dist.barrier()  # only so that the ranks' rates are of the same moment
        pooled = _generate(context, job, model, tokenizer, mine, "pooled")
        trace = list(pool.trace()) if job.trace_rank == context.rank else []
        stats = _since(before, pool_figures(pool))
        report = {"active": bool(pool.active), "reason": str(pool.reason or ""), "layers": pool.num_layers}
    finally:
        pool.close()
    kv_bytes = _kv_bytes_per_token(model)
    del model
    unpooled = None
    if job.verify:
        model = _plain_model(job.model)
        _warm_up(job, model, tokenizer, mine)
        dist.barrier()
        unpooled = _generate(context, job, model, tokenizer, mine, "unpooled")
    return RankReport(context.rank, stats, pooled, unpooled, kv_bytes, trace=trace, **report)


def pool_figures(pool) -> dict[str, Any]:
    """The pool's statistics as plain numbers, bytes and seconds."""
    import dataclasses

    return dataclasses.asdict(pool.stats())


def _since(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The figures of the measured run alone: what counts up is taken from where the warm-up left it."""
    counters = ("fetches", "fetched_bytes", "stalls", "stall_seconds", "restarts")
    return {**after, **{name: after[name] - before[name] for name in counters}}


def _quiet() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _dtype(source: ModelSource):
    import torch
    from transformers import AutoConfig

    dtype = getattr(AutoConfig.from_pretrained(source.path), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _pooled_model(source: ModelSource, config):
    import sidp

    if source.path is None:
        model = random_model()
        return sidp.pool_model(model, config=config), model
    pool, model = sidp.from_pretrained(source.path, config=config, dtype=_dtype(source))
    return pool, model.eval()


def _plain_model(source: ModelSource):
    from transformers import AutoModelForCausalLM

    if source.path is None:
        return random_model()
    return AutoModelForCausalLM.from_pretrained(source.path, dtype=_dtype(source)).eval()


def _tokenizer(source: ModelSource):
    """The model's tokenizer, padding on the left as batched generation needs; None for the random model."""
    if source.path is None:
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _generate(context: RankContext, job: Job, model, tokenizer, mine: list[int], phase: str) -> Run:
    answers: list[Answer] = []
    start = time.perf_counter()
    for first in range(0, len(mine), job.batch_size):
        batch = mine[first : first + job.batch_size]
        rows = _generate_batch(context, job, model, tokenizer, [job.prompts[index].text for index in batch], phase)
        answers += [Answer(index, row, _text(tokenizer, row)) for index, row in zip(batch, rows, strict=True)]
        spent = sum(len(row) for row in rows)
        context.send(Progress(phase, 0, len(batch) * job.max_new_tokens - spent))
    return Run(tuple(answers), time.perf_counter() - start)


def _generate_batch(context, job: Job, model, tokenizer, texts: list[str], phase: str) -> list[tuple[int, ...]]:
    """Greedy tokens of each text, [len(texts)] rows of at most max_new_tokens, cut after the end token."""
    inputs = _encode(tokenizer, texts)
    end_tokens = _end_tokens(model)
    counter = _Counter(len(texts), end_tokens, lambda tokens: context.send(Progress(phase, tokens)))
    output = _greedy(model, tokenizer, inputs, job.max_new_tokens, counter)
    generated = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [_up_to_end(row, end_tokens) for row in generated]


def _greedy(model, tokenizer, inputs: dict[str, Any], max_new_tokens: int, streamer=None):
    import torch

    padding = model.generation_config.pad_token_id
    if padding is None:
        padding = 0 if tokenizer is None else tokenizer.pad_token_id
    with torch.inference_mode():
        return model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=padding, streamer=streamer
        )


def _warm_up(job: Job, model, tokenizer, mine: list[int]) -> None:
    """The first batch's prefill and a step: kernels are compiled and pages are touched before the clock runs."""
    if mine:
        texts = [job.prompts[index].text for index in mine[: job.batch_size]]
        _greedy(model, tokenizer, _encode(tokenizer, texts), min(2, job.max_new_tokens))


def _end_tokens(model) -> set[int]:
    end = model.generation_config.eos_token_id
    if end is None:
        return set()
    return set(end) if isinstance(end, (list, tuple)) else {int(end)}


def _up_to_end(row: list[int], end_tokens: set[int]) -> tuple[int, ...]:
    for position, token in enumerate(row):
        if token in end_tokens:
            return tuple(row[: position + 1])
    return tuple(row)


def _encode(tokenizer, texts: list[str]) -> dict[str, Any]:
    """input_ids and attention_mask, both [len(texts), longest], int64, padded on the left."""
    if tokenizer is not None:
        if tokenizer.chat_template:
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
                )
                for text in texts
            ]
        encoded = tokenizer(texts, return_tensors="pt", padding=True)
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    import torch

    rows = [list(text.encode()[:_RANDOM_PROMPT_BYTES]) or [1] for text in texts]
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def _text(tokenizer, tokens: tuple[int, ...]) -> str:
    if tokenizer is None:
        return bytes(tokens).hex(" ")
    return tokenizer.decode(tokens, skip_special_tokens=True)


def _kv_bytes_per_token(model) -> int:
    """Keys and values of one token in every layer, bytes, for a cache in the model's dtype."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize

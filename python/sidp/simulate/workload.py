"""The requests of a job: fixed or sampled lengths, all at once or over time, dealt out to ranks or taken from one queue."""

from __future__ import annotations

import random

from .._native import C
from ..errors import ConfigError


def job(
    count: int,
    prompt: int,
    answer: int,
    *,
    ranks: int | None = None,
    spread: float = 0.0,
    arrivals_per_s: float | None = None,
    seed: int = 0,
) -> list:
    """`count` native requests.

    Args:
        prompt, answer: tokens; the means where `spread` is above 0.
        ranks: deal them out to so many ranks in turn; None leaves them in one queue that all ranks take from.
        spread: lengths are drawn evenly from mean * (1 - spread) ... mean * (1 + spread), below 1.
        arrivals_per_s: None: all are there at the start. Else intervals are exponential with that mean rate.
        seed: of the lengths and the arrivals.
    """
    if count < 1 or prompt < 1 or answer < 1:
        raise ConfigError(f"a job needs 1 request, prompt and answer token or more, got {count}, {prompt} and {answer}")
    if not 0 <= spread < 1:
        raise ConfigError(f"spread must be 0 or more and less than 1, got {spread}")
    draw = random.Random(seed)
    now, made = 0.0, []
    for number in range(count):
        sizes = [max(1, round(mean * (1 + spread * (2 * draw.random() - 1)))) for mean in (prompt, answer)]
        if arrivals_per_s is not None:
            now += draw.expovariate(arrivals_per_s)
        made.append(C.SimRequest(now, *sizes, rank=-1 if ranks is None else number % ranks))
    return made


def decoding(ranks: int, rows: int, iterations: int, context: int) -> list:
    """`rows` requests on each rank whose prompts of `context` tokens but one are in the cache already: every rank then runs
    `iterations` iterations of `rows` rows, for steady states."""
    return [
        C.SimRequest(0.0, context, iterations, cached=context - 1, rank=rank)
        for rank in range(ranks)
        for _ in range(rows)
    ]

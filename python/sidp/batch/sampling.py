"""Sampling by request: temperature, top_p, top_k and a seed of its own in every row of one batch.

A token is drawn as argmax(scores / temperature + Gumbel noise), which draws from the softmax. The noise is a hash of
(the request's seed, the position of the token, the token's id): no generator has a state, so a request draws the same
whatever batch, rank or order it runs in. Rows of temperature 0 get neither and stay the most likely token.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from .records import Request

_GREEDY = 0  # the hash word of a row that does not sample


@dataclass(frozen=True)
class RowSampling:
    """What one row of a batch asks for at one position. `word`: 32 bits of noise, 0 for the most likely token."""

    temperature: float
    top_p: float
    top_k: int
    word: int


def row_sampling(request: Request, position: int) -> RowSampling:
    """`position`: of the token to draw, counted from the prompt's first token."""
    if not request.samples:
        return RowSampling(1.0, 1.0, 0, _GREEDY)
    digest = hashlib.blake2b(f"{request.seed}/{position}".encode(), digest_size=4).digest()
    word = int.from_bytes(digest, "little", signed=True) or 1
    return RowSampling(request.temperature, request.top_p, max(0, request.top_k), word)


def gumbel_noise(words: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """[rows, vocabulary] float32 from `words` [rows] int32; rows of word 0 are zeros. No host synchronisation."""
    token = torch.arange(vocabulary, device=words.device, dtype=torch.int64)
    mixed = (words.to(torch.int64) & 0xFFFFFFFF).unsqueeze(1) * 0x9E3779B1 + token * 0x85EBCA77
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # a known 32-bit finaliser, kept in 64 bits
        mixed = mixed & 0xFFFFFFFF
        mixed = (mixed ^ (mixed >> shift)) * factor
    mixed = mixed & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 16)
    uniform = (mixed.to(torch.float32) + 0.5) / 4294967296.0
    noise = -torch.log(-torch.log(uniform.clamp(1e-10, 1 - 6e-8)))
    return torch.where((words != _GREEDY).unsqueeze(1), noise, torch.zeros((), device=words.device))


def keep_likeliest(scores: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """`scores` [rows, vocabulary] with -inf outside each row's nucleus; top_k 0 and top_p 1 keep all. Ties are kept."""
    ordered, _ = scores.sort(dim=-1, descending=True)
    before = ordered.softmax(dim=-1).cumsum(dim=-1)
    before = torch.cat((torch.zeros_like(before[:, :1]), before[:, :-1]), dim=1)  # probability of all likelier tokens
    places = torch.arange(scores.shape[1], device=scores.device)
    limit = torch.where(top_k > 0, top_k, scores.shape[1]).unsqueeze(1)
    keep = (before < top_p.unsqueeze(1)) & (places < limit)
    keep[:, 0] = True
    last = keep.sum(dim=1, keepdim=True) - 1
    return scores.masked_fill(scores < ordered.gather(1, last), float("-inf"))


def choose(scores: torch.Tensor, rows: list[RowSampling]) -> torch.Tensor:
    """Scores whose argmax is each row's token; [rows, vocabulary] float32 in and out."""
    device = scores.device
    temperature = torch.tensor([row.temperature for row in rows], dtype=torch.float32, device=device)
    scores = scores.float() / temperature.unsqueeze(1)
    if any(row.top_p < 1 or row.top_k > 0 for row in rows):
        top_p = torch.tensor([row.top_p for row in rows], dtype=torch.float32, device=device)
        top_k = torch.tensor([row.top_k for row in rows], device=device)
        scores = keep_likeliest(scores, top_p, top_k)
    words = torch.tensor([row.word for row in rows], dtype=torch.int32, device=device)
    return scores + gumbel_noise(words, scores.shape[1])

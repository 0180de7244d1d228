"""How much KV cache a rank may have where several ranks share one device: an even part, and no race for what is free.

Of a device's memory the ranks on it may use `utilization` in all. Nobody allocates a cache before everybody has
measured: (1) a rank that has loaded says so; (2) once all live ranks have, it measures what its device has left, and
(3) says so; (4) once all live ranks have, each takes an even part of what is left.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ..errors import ConfigError, SidpError
from .queue import Board

_LOAD_S = 900.0  # between the first rank that has loaded and the last
_STEP_S = 0.02
SPARE_PAGES = 2  # pages the engine adds to what it hands out, for padding


def kv_bytes_per_token(model) -> int:
    """Keys and values of one token in every layer, bytes, in the model's dtype."""
    return model.config.get_text_config().num_hidden_layers * _layer_bytes_per_token(model)


def _layer_bytes_per_token(model) -> int:
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * heads * width * model.dtype.itemsize


@dataclass(frozen=True)
class Share:
    """A rank's even part of what its device has left for caches and activations. Bytes."""

    left: int
    total: int
    ranks: int


def share_of_device(board: Board, device: torch.device, utilization: float) -> Share:
    """Collective over the live ranks of a run; the steps are those of the module. ConfigError where nothing is left."""
    facts = torch.cuda.get_device_properties(device)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    board.report(gpu=_number(str(facts.uuid)), loaded=1)
    _wait_for(board, "loaded")
    free, total = torch.cuda.mem_get_info(device)
    mine = board.rank_figures(board.rank)["gpu"]
    here = [r for r in range(board.world_size) if board.alive(r) and board.rank_figures(r)["gpu"] == mine]
    board.report(measured=1)
    _wait_for(board, "measured")
    left = int(utilization * total) - (total - free)
    if left <= 0:
        raise ConfigError(
            f"it does not fit: the weights and workspaces of {len(here)} rank(s) take {(total - free) / 1e9:.1f} GB of "
            f"{facts.name}, and --gpu-memory-utilization {utilization:g} allows {utilization * total / 1e9:.1f} GB; use "
            "fewer ranks, a larger utilization or a smaller model"
        )
    return Share(left // len(here), total, len(here))


def _number(uuid: str) -> int:
    """Of a device, the same in every process; exact as a float64."""
    return int(uuid.replace("-", "")[-12:], 16) + 1


def _wait_for(board: Board, name: str) -> None:
    end = time.monotonic() + _LOAD_S
    while True:
        late = [r for r in range(board.world_size) if not board.rank_figures(r)[name] and board.alive(r)]
        if not late:
            return
        if time.monotonic() > end:
            raise SidpError(f"rank {late[0]} had not {name} within {_LOAD_S:g} s of this one: is it stuck?")
        time.sleep(_STEP_S)


def activation_bytes(rows: int, hidden: int, inner: int, itemsize: int) -> int:
    """Of an FFN's forward over `rows` rows: three intermediates and three hidden states a row."""
    return 3 * rows * (hidden + inner) * itemsize


def logit_bytes(vocabulary: int, itemsize: int) -> int:
    """Of sampling one sequence: its logits in the model's dtype and in float32, and their probabilities."""
    return vocabulary * (itemsize + 8)


def cache_bytes(
    model, left: int, batch_tokens: int, page: int, mean_cost: int, max_batch: int | None, flash: bool
) -> int:
    """Bytes of KV cache out of `left`, after what a step of `batch_tokens` rows needs beside it.

    Args:
        mean_cost: tokens of a request, which says how many of them the cache will hold, and so how many are sampled.
        max_batch: requests at once at most, where that is fixed.
        flash: attention reads one layer's keys and values as they are; otherwise it repeats them by head and masks.

    Raises:
        ConfigError: not even one page is left.
    """
    config, size = model.config.get_text_config(), model.dtype.itemsize
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    forward = activation_bytes(batch_tokens, config.hidden_size, inner, size)
    a_logit = logit_bytes(config.vocab_size, size)
    token, read = kv_bytes_per_token(model), _layer_bytes_per_token(model)
    if not flash:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        read = read * (1 + config.num_attention_heads // heads) + 2 * batch_tokens * size
    of_token = token + read + 16  # and two indices of 64 bits
    tokens = (left - forward) / of_token
    if max_batch is not None:
        tokens = min(tokens, (left - min(max_batch, batch_tokens) * a_logit) / of_token)
    else:
        tokens = min(tokens, left / (of_token + a_logit / max(1, mean_cost)))
    pages = int(tokens) // page - SPARE_PAGES
    if pages < 1:
        raise ConfigError(
            f"it does not fit: {left / 1e9:.2f} GB are left for a rank's KV cache and a step of {batch_tokens} tokens, "
            "which is not enough; use fewer ranks, --gpu-memory-utilization, or --max-batched-tokens"
        )
    return pages * page * token

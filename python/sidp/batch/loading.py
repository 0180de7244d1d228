"""A rank's model: pooled or whole, its tokenizer, and the engine over it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError
from .attention import kind
from .engine import EngineOptions, PagedEngine, default_batch_tokens, default_kv_bytes, page_tokens
from .memory import cache_bytes, share_of_device
from .padded import PaddedEngine
from .queue import Board
from .text import Codec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """`pool` is None in a replicated run. `make_engine(board)` comes last: it takes the memory that is left."""

    model: Any
    pool: Any
    codec: Codec
    make_engine: Callable[[Board], Any]


def load(job, rank: int) -> Loaded:
    """Collective in a pooled run. `job` is a worker.Job."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = choose_device(job.backend, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    pool, model = _pooled(job, device) if job.pooled else (None, _whole(job, device))
    codec = _codec(job, model)
    try:
        _first_forward(model)
    except BaseException as error:
        if pool is not None:
            pool.__exit__(type(error), error, None)
        raise
    return Loaded(model, pool, codec, lambda board: _engine(job, board, pool, model, codec))


def choose_device(backend: str, rank: int) -> torch.device:
    """`backend` "auto": CUDA where torch has a device. Ranks share devices round-robin where they are more."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if backend == "cuda" and count == 0:
        raise ConfigError("--backend cuda: torch sees no CUDA device here; use --backend cpu")
    if backend == "cpu" or count == 0:
        return torch.device("cpu")
    return torch.device("cuda", rank % count)


def _dtype(job) -> torch.dtype:
    if job.dtype != "auto":
        return getattr(torch, job.dtype)
    if job.model is None:
        return torch.bfloat16
    from ..hf.dummy import model_config

    dtype = getattr(model_config(job.model), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _random(job, device: torch.device):
    from ..cli.models import random_model

    return random_model().to(device=device, dtype=_dtype(job))


def _pooled(job, device: torch.device):
    import sidp

    # None where the CPU is the only choice: then SIDP_DEVICE still has a say.
    config = sidp.PoolConfig(**job.pool_config, device=str(device))
    if job.model is None:
        model = _random(job, device)
        return sidp.pool_model(model, config=config), model
    if job.load_format == "dummy":
        from ..hf.dummy import dummy_pretrained

        return dummy_pretrained(job.model, _dtype(job), config=config)
    pool, model = sidp.from_pretrained(job.model, config=config, dtype=_dtype(job))
    return pool, model.eval()


def _whole(job, device: torch.device):
    from transformers import AutoModelForCausalLM

    if job.model is None:
        return _random(job, device)
    if job.load_format == "dummy":
        from ..hf.dummy import dummy_model

        return dummy_model(job.model, _dtype(job), device)
    return AutoModelForCausalLM.from_pretrained(job.model, dtype=_dtype(job)).to(device).eval()


def _codec(job, model) -> Codec:
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    end = model.generation_config.eos_token_id
    ends = set(end) if isinstance(end, (list, tuple)) else set() if end is None else {int(end)}
    tokenizer = None
    if job.model is not None and job.load_format != "dummy":
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(job.model)
        except Exception as error:  # whatever transformers raises on a folder without one
            raise ConfigError(f"{job.model} has no tokenizer that loads ({type(error).__name__}: {error})") from error
        if not ends and tokenizer.eos_token_id is not None:
            ends = {tokenizer.eos_token_id}
    return Codec(tokenizer, {token for token in ends if token >= 0}, context, config.vocab_size)


@torch.inference_mode()
def _first_forward(model) -> None:
    """Libraries allocate their workspaces at first use; let it be before the KV cache is sized."""
    model(input_ids=torch.zeros((1, 2), dtype=torch.int64, device=model.device), use_cache=False)


def _engine(job, board: Board, pool, model, codec: Codec):
    # On a CPU a step is long and batches are small: what repeats exactly is worth more than what is always full.
    batching = job.batching
    if batching == "auto":
        batching = "continuous" if model.device.type == "cuda" else "grouped"
    max_batch = job.max_batch
    if batching != "continuous":
        max_batch = job.group
    options = EngineOptions(
        grouped=batching != "continuous",
        max_batch=max_batch,
        kv_bytes=_kv_bytes(job, board, model, max_batch),
        samples=job.samples,
        filters=job.filters,
        mean_cost=job.mean_cost,
        batch_tokens=job.batch_tokens,
        graphs=job.graphs,
    )
    if batching == "padded":
        return PaddedEngine(model, codec, options)
    with contextlib.suppress(ConfigError) if job.batching == "auto" else contextlib.nullcontext():
        return PagedEngine(model, codec, options, pool)
    logger.warning("sidp: %s cannot run with a paged KV cache; padded batches instead", type(model).__name__)
    return PaddedEngine(model, codec, options)


def _kv_bytes(job, board: Board, model, max_batch: int | None) -> int:
    """Collective on GPUs, where the KV cache follows what the ranks of a device have left."""
    if job.kv_bytes is not None:
        return job.kv_bytes
    if model.device.type != "cuda":
        return default_kv_bytes()
    share = share_of_device(board, model.device, job.utilization)
    rows = job.batch_tokens or default_batch_tokens(model.device)
    flash = kind(model) != "sdpa"
    return cache_bytes(model, share.left, rows, page_tokens(model), job.mean_cost, max_batch, flash)

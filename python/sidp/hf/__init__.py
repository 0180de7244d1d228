"""Hugging Face transformers: load a model's share, pool a loaded model in place, undo it."""

from .loading import from_pretrained
from .pooling import pool_model, unpool_model

__all__ = ["from_pretrained", "pool_model", "unpool_model"]

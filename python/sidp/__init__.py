"""FFN weights kept once per data-parallel group. Importing this imports neither torch nor the native module."""

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import ConfigError, LayoutError, PeerError, PoolClosedError, SidpError

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import FFNSpec, PoolConfig, TensorSpec, Unit
    from .ffn import ffn_forward
    from .hf import from_pretrained, pool_model, unpool_model
    from .pool import WeightPool
    from .stats import PoolStats

_HOME = {
    "FFNSpec": "config",
    "PoolConfig": "config",
    "TensorSpec": "config",
    "Unit": "config",
    "ffn_forward": "ffn",
    "from_pretrained": "hf",
    "pool_model": "hf",
    "unpool_model": "hf",
    "WeightPool": "pool",
    "PoolStats": "stats",
}

__all__ = [
    "ConfigError",
    "FFNSpec",
    "LayoutError",
    "PeerError",
    "PoolClosedError",
    "PoolConfig",
    "PoolStats",
    "SidpError",
    "TensorSpec",
    "Unit",
    "WeightPool",
    "ffn_forward",
    "from_pretrained",
    "pool_model",
    "unpool_model",
]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'sidp' has no attribute '{name}'")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_HOME])

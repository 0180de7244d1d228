"""sidp inside vLLM: each rank is an engine of its own, and their FFN weights form one pool. See docs/vllm.md.

Importing this imports neither torch nor vLLM.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from ..errors import ConfigError

logger = logging.getLogger(__name__)

__all__ = ["WorkerExtension", "close", "register", "stats", "use_torchrun"]


def register() -> None:
    """vLLM's entry point, called in each of its processes: makes ``load_format="sidp"`` known, and changes nothing else.

    With SIDP_VLLM=1 the load formats "auto", "hf" and "safetensors" mean "sidp" too.

    Raises:
        UnsupportedVllmError: SIDP_VLLM=1, and this vLLM lacks what the plugin builds on.
    """
    chosen = os.environ.get("SIDP_VLLM") == "1"
    try:
        from .loader import register_loader
    except ImportError as error:
        from .versions import UnsupportedVllmError, installed

        message = f"vLLM {installed()} lacks what sidp's plugin builds on ({error})"
        if chosen:
            raise UnsupportedVllmError(f"{message}; unset SIDP_VLLM, or see docs/vllm.md for versions") from error
        logger.warning("%s: load_format='sidp' is not offered", message)
        return
    register_loader(("sidp", "auto", "hf", "safetensors") if chosen else ("sidp",))


def use_torchrun(tensor_parallel_size: int = 1) -> None:
    """Makes this torchrun rank an engine of its own; call it before anything of torch or vLLM is imported.

    Moves torchrun's variables to SIDP_VLLM_*, because vLLM would take them for its own group, and leaves this rank's
    ``tensor_parallel_size`` GPUs visible.

    Raises:
        ConfigError: torchrun did not start this process.
    """
    from .group import use_torchrun

    use_torchrun(tensor_parallel_size)


def stats(llm: Any) -> list[dict[str, Any]]:
    """``WeightPool.stats()`` of an engine as a dict, one a tensor-parallel rank. ``llm``: vLLM's LLM, with the extension."""
    return _call(llm, "sidp_stats")


def close(llm: Any) -> None:
    """Collective: call it when this rank's work is done. Serves the other ranks until all have come here or died.

    An engine that ends without it takes its share of the weights with it. ``llm``: vLLM's LLM, with the extension;
    it cannot generate any more.
    """
    _call(llm, "sidp_close")


def _call(llm: Any, method: str) -> list[Any]:
    extension = llm.llm_engine.vllm_config.parallel_config.worker_extension_cls
    if extension != "sidp.vllm.WorkerExtension":
        raise ConfigError(
            f"this engine has worker_extension_cls={extension!r}: pass worker_extension_cls='sidp.vllm.WorkerExtension'"
        )
    return llm.collective_rpc(method)


class WorkerExtension:
    """What ``worker_extension_cls="sidp.vllm.WorkerExtension"`` adds to vLLM's workers, for ``stats`` and ``close``."""

    def sidp_stats(self) -> dict[str, Any]:
        from dataclasses import asdict

        return asdict(self.sidp_pool().stats())

    def sidp_close(self) -> None:
        self.sidp_pool().close()

    def sidp_pool(self):
        """This worker's WeightPool."""
        from .mlp import pool_of

        return pool_of(self.model_runner.get_model())

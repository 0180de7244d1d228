"""vLLM's model loader for load_format="sidp": a rank reads only its share of the FFN weights, into the pool."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.model_loader import get_model_cls, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

import sidp

from ..config import PoolConfig
from ..errors import ConfigError
from ..hf.agree import agreement
from ..hf.checkpoint import Checkpoint, resolve_folder
from ..pool import WeightPool
from .group import Place, join
from .mlp import OP, made_in_place_of, pooled_mlps
from .refusals import mlp_class_of, refuse
from .versions import require_supported
from .weights import FFNTensors, require_loaded

# Engines of a group start far apart: one may compile or download while another waits.
_TIMEOUT_S = 600.0


def register_loader(load_formats: Iterable[str]) -> None:
    """Idempotent: vLLM may call its plugins more than once."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as registered

    for load_format in load_formats:
        if registered.get(load_format) is not SidpModelLoader:
            register_model_loader(load_format)(SidpModelLoader)


class SidpModelLoader(BaseModelLoader):
    """Collective over the engines of a group: each loads the model, and all of them commit one pool."""

    def __init__(self, load_config: Any) -> None:
        require_supported()
        super().__init__(load_config)
        if load_config.model_loader_extra_config:
            raise ConfigError(
                f"load_format='sidp' takes no model_loader_extra_config, got {load_config.model_loader_extra_config!r}: "
                "settings of the pool are SIDP_* environment variables"
            )
        self._loading: _Loading | None = None

    def download_model(self, model_config: Any) -> None:
        self._folder(model_config)

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """The model with everything but its FFNs loaded by vLLM's own code, and its FFNs pooled.

        Raises:
            ConfigError: a setting or a model that the pool does not go with, before anything is allocated.
            PeerError: an engine of the group died or did not come in time.
        """
        refuse(vllm_config, model_config)
        module, name = mlp_class_of(get_model_cls(model_config))
        with contextlib.ExitStack() as on_error:
            checkpoint = Checkpoint(self._folder(model_config))
            on_error.callback(checkpoint.close)
            self._loading = _Loading(_pool_config(vllm_config), checkpoint, on_error)
            _tell_the_compiler(vllm_config)
            try:
                with made_in_place_of(module, name):
                    model = super().load_model(vllm_config, model_config, prefix)
                self._loading.install(model)
            finally:
                self._loading = None
            on_error.pop_all()
        checkpoint.close()
        return model

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        if self._loading is None:
            raise ConfigError(
                "the weights of a pool are fixed once it is committed: start a new engine for new weights"
            )
        self._loading.load(model)

    def _folder(self, model_config: Any):
        hub = {"revision": model_config.revision, "cache_dir": self.load_config.download_dir}
        return resolve_folder(model_config.model, hub)


class _Loading:
    """One model on its way into an engine and its pool."""

    def __init__(self, config: PoolConfig, checkpoint: Checkpoint, on_error: contextlib.ExitStack) -> None:
        self._config, self._on_error = config, on_error
        tp_rank, tp_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self._tensors = FFNTensors(checkpoint, tp_rank, tp_size)
        self._members = join(Place.from_environment(), tp_rank, tp_size, config.timeout_s)
        self._pool: WeightPool | None = None

    def load(self, model: nn.Module) -> None:
        mlps = pooled_mlps(model)
        units = [mlp.unit() for mlp in mlps]
        with agreement(self._members, self._config) as others:
            self._tensors.check(units)
            loaded = model.load_weights(self._tensors.rest())
            pooled = {id(parameter) for mlp in mlps for parameter in mlp.parameters()}
            names = {name for name, parameter in model.named_parameters() if id(parameter) in pooled}
            require_loaded(model, loaded, names)
            others.barrier("loaded")
        self._pool = self._on_error.enter_context(WeightPool(units, group=self._members, config=self._config))
        self._tensors.load_share(self._pool)
        self._pool.commit()

    def install(self, model: nn.Module) -> None:
        pool, mlps = self._pool, pooled_mlps(model)
        for layer, mlp in enumerate(mlps):
            mlp.attach(pool, layer)
        pool.on_close(lambda: [mlp.detach() for mlp in mlps])
        _check_every_step(model, pool)
        if current_platform.is_cpu():
            from .cpu import leave_peers_out_of_rss

            leave_peers_out_of_rss()


def _check_every_step(model: nn.Module, pool: WeightPool) -> None:
    """The logits are computed outside of graphs and compiled code: there the host hears of a peer that has died."""
    own = model.compute_logits

    def compute_logits(*args: Any, **kwargs: Any) -> Any:
        pool.check()
        return own(*args, **kwargs)

    model.compute_logits = compute_logits


def _pool_config(vllm_config: Any) -> PoolConfig:
    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        raise ConfigError(f"load_format='sidp' runs on CUDA and on the CPU, not on {current_platform.device_type}")
    device = torch.device(vllm_config.device_config.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    config = dataclasses.replace(PoolConfig(), device=str(device))
    return config if "SIDP_TIMEOUT_S" in os.environ else dataclasses.replace(config, timeout_s=_TIMEOUT_S)


def _tell_the_compiler(vllm_config: Any) -> None:
    """Compiled code of a pooled model must not be taken for that of a plain one, and is cut at the operator.

    Its argument is a name, which differs from layer to layer: inside a piece it would keep equal layers from sharing
    their code. In a piecewise CUDA graph it would wait for its own fetches only; outside, they run ahead.
    """
    if not isinstance(vllm_config.additional_config, dict):
        raise ConfigError("load_format='sidp' needs additional_config to be a dict, as it is by default")
    vllm_config.additional_config["sidp"] = sidp.__version__
    pieces = vllm_config.compilation_config.splitting_ops
    if pieces and OP not in pieces:
        pieces.append(OP)

"""Pool the FFNs of a loaded transformers model in place, and undo it.

Only instances are patched. An FFN keeps its own forward: its parameters point at static views (the arena for what this
rank owns, the unit's ring slot otherwise), and its forward is wrapped in acquire and release.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..config import PoolConfig
from ..errors import ConfigError, PoolClosedError, SidpError
from ..pool import WeightPool
from .agree import agreement
from .guards import GuardedAttributes, install_guards
from .recognize import FoundFFN, find_ffns

log = logging.getLogger(__name__)

_STATE = "_sidp_pooled"  # in the root module's __dict__: its PooledModel
_PART = "_sidp_pooled_part"  # in every pooled FFN's __dict__


def pool_model(model: nn.Module, group: Any = None, config: PoolConfig | None = None) -> WeightPool:
    """Collective: pool the FFN weights of `model` over `group`, in place, and free what this rank does not own.

    Every rank passes the same model, whole and on one device. The model is switched to eval mode and its parameters to
    requires_grad=False: it is for inference from here on, until `unpool_model`. Raises ConfigError, before anything
    changes, for a model that cannot be pooled; LayoutError and PeerError as `WeightPool` does.
    """
    config = PoolConfig() if config is None else config
    with agreement(group, config) as others:
        refuse_pooled(model)
        ffns = find_ffns(model)
        _refuse_gradients(ffns)
        others.barrier("pool_model")
    with contextlib.ExitStack() as on_error:
        units = [f.unit for f in ffns]
        pool = on_error.enter_context(WeightPool(units, group=group, config=_with_device(config, ffns)))
        for layer, ffn in enumerate(ffns):
            if pool.owns(layer):
                pool.load(layer, {name: m._parameters[leaf].detach() for name, m, leaf in ffn.parameters()})
        pool.commit()
        install(model, pool, ffns)
        on_error.pop_all()
    return pool


def unpool_model(model: nn.Module) -> nn.Module:
    """Give `model` ordinary private weights again, bit for bit, and its own forwards; returns `model`.

    Local: other ranks go on, but the pool must still be open, since remote units are streamed through the ring once.
    Needs memory for all FFN weights. The pool itself stays open; close it when every rank is done with it.
    """
    pooled: PooledModel | None = model.__dict__.get(_STATE)
    if pooled is None:
        raise ConfigError(f"{type(model).__name__} is not pooled: pass the model that was given to sidp.pool_model.")
    pooled.undo()
    return model


def install(model: nn.Module, pool: WeightPool, ffns: list[FoundFFN]) -> None:
    """Point the FFNs of `model` at a committed pool (unit i is ffns[i]) and guard it; nothing can fail half-way."""
    views = [pool.tensors(layer) for layer in range(len(ffns))]
    pooled = PooledModel(model, pool, ffns)
    pooled.attach(views)
    alive = weakref.ref(pooled)  # the pool, which must outlive the model for the other ranks, does not keep it
    pool.on_close(lambda: _detach(alive()))
    release_host_memory()


def _detach(pooled: PooledModel | None) -> None:
    if pooled is not None:
        pooled.detach()


def refuse_pooled(model: nn.Module) -> None:
    for module in model.modules():
        if _PART in module.__dict__:
            raise ConfigError(
                f"{type(model).__name__} is pooled already (its {type(module).__name__}); call sidp.unpool_model on "
                "the model that was pooled before pooling it again."
            )


def _with_device(config: PoolConfig, ffns: list[FoundFFN]) -> PoolConfig:
    """`config` with the device the weights lie on where it leaves that open."""
    if config.device is not None:
        return config
    _, module, leaf = next(iter(ffns[0].parameters()))
    return dataclasses.replace(config, device=str(module._parameters[leaf].device))


def release_host_memory() -> None:
    """Hand freed heap pages back to the system: freed weights below malloc's mmap threshold would stay with us."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class PooledModel:
    """What was done to one model: enough to undo it, and to make it safe when the pool closes."""

    def __init__(self, model: nn.Module, pool: WeightPool, ffns: list[FoundFFN]) -> None:
        self.model = model
        self.pool = pool
        self.ffns = ffns
        self.closed = False
        self._guarded = GuardedAttributes()
        self._trainable: list[nn.Parameter] = []
        self._training: list[nn.Module] = []

    def attach(self, views: list[dict[str, torch.Tensor]]) -> None:
        self._training = [m for m in self.model.modules() if m.training]
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        if self._training:
            log.info("pooling %s: switched to eval mode", type(self.model).__name__)
            self.model.eval()
        for param in self._trainable:
            param.requires_grad = False
        for ffn, tensors in zip(self.ffns, views, strict=True):
            for name, module, leaf in ffn.parameters():
                _set_parameter(module, leaf, tensors[name])
        for layer, ffn in enumerate(self.ffns):
            self._wrap(layer, ffn)
            self._guarded.set(ffn.module, _PART, True)
        paths = [f"{f.path}.{p.name}" for f in self.ffns for p in f.projections]
        install_guards(self._guarded, self.model, paths)
        self.model.__dict__[_STATE] = self

    def detach(self) -> None:
        """The pool closes: from here on no parameter may point into its memory."""
        if self.model.__dict__.get(_STATE) is not self:
            return
        self.closed = True
        for ffn in self.ffns:
            for _, module, leaf in ffn.parameters():
                param = module._parameters[leaf]
                _set_parameter(module, leaf, torch.empty(0, dtype=param.dtype, device=param.device))

    def undo(self) -> None:
        self.refuse_closed()
        private = [self._copy_unit(layer, ffn) for layer, ffn in enumerate(self.ffns)]  # may fail: changes nothing
        self._guarded.restore()
        del self.model.__dict__[_STATE]
        for ffn, tensors in zip(self.ffns, private, strict=True):
            for name, module, leaf in ffn.parameters():
                _set_parameter(module, leaf, tensors[name])
        for param in self._trainable:
            param.requires_grad = True
        for module in self._training:
            module.training = True

    def refuse_closed(self) -> None:
        if self.closed:
            raise PoolClosedError(
                "the pool of this model is closed and its FFN weights are gone; call sidp.unpool_model(model) before "
                "pool.close(), or load the model again."
            )

    def _copy_unit(self, layer: int, ffn: FoundFFN) -> dict[str, torch.Tensor]:
        self.pool.acquire(layer)
        try:
            return {name: m._parameters[leaf].detach().clone() for name, m, leaf in ffn.parameters()}
        finally:
            self.pool.release(layer)

    def _wrap(self, layer: int, ffn: FoundFFN) -> None:
        if ffn.own_module:
            self._guarded.set(ffn.module, "forward", self._around(layer, ffn))
            return
        # The FFN lies open in the decoder layer (OPT): take the slot at the first projection, hand it back after the
        # last one, and again behind the layer in case an error came between the two.
        use = _Use(self, layer)
        first, last = ffn.projections[0].module, ffn.projections[-1].module
        self._guarded.set(first, "forward", use.before(first.forward))
        self._guarded.set(last, "forward", use.after(last.forward))
        self._guarded.set(ffn.layer, "forward", use.after(ffn.layer.forward))

    def _around(self, layer: int, ffn: FoundFFN) -> Callable[..., Any]:
        own, acquire, release, run = ffn.module.forward, self.pool.acquire, self.pool.release, self.pool.run
        # CaS computes elsewhere what the children would have computed: where one has a hook, its forward must run here.
        inside = [child for child in ffn.module.modules() if child is not ffn.module]
        hooks = [table for child in inside for table in (child._forward_pre_hooks, child._forward_hooks)]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.closed:
                self.refuse_closed()
            _refuse_autograd(args)
            if len(args) == 1 and not kwargs and not any(hooks):
                return run(layer, args[0], lambda _: own(args[0]))  # WaS, or CaS where the mode says so
            acquire(layer)
            try:
                return own(*args, **kwargs)
            finally:
                release(layer)

        return forward


class _Use:
    """One layer's slot taken by one module's forward and handed back by another's."""

    def __init__(self, pooled: PooledModel, layer: int) -> None:
        self._pooled = pooled
        self._layer = layer
        self._held = False

    def before(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._pooled.refuse_closed()
            _refuse_autograd(args)
            self._pooled.pool.acquire(self._layer)
            self._held = True
            return own(*args, **kwargs)

        return forward

    def after(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            try:
                return own(*args, **kwargs)
            finally:
                if self._held:
                    self._held = False
                    self._pooled.pool.release(self._layer)

        return forward


def _set_parameter(module: nn.Module, leaf: str, value: torch.Tensor) -> None:
    """Give a parameter other bytes and keep the object, so that whoever else holds it keeps no memory alive."""
    param = module._parameters.get(leaf)
    if param is None:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        param.data = value


def _refuse_gradients(ffns: list[FoundFFN]) -> None:
    for ffn in ffns:
        for name, module, leaf in ffn.parameters():
            if module._parameters[leaf].grad is not None:
                raise ConfigError(
                    f"{ffn.path}.{name} has a gradient; pooling is for inference. Call "
                    "model.zero_grad(set_to_none=True) first."
                )


def _refuse_autograd(args: tuple[Any, ...]) -> None:
    if args and isinstance(args[0], torch.Tensor) and args[0].requires_grad and torch.is_grad_enabled():
        raise SidpError(
            "a pooled FFN was called with an input that requires a gradient; pooling is for inference only. Run under "
            "torch.no_grad(), or call sidp.unpool_model(model) first."
        )

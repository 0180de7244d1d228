"""vLLM's own MLP without weights of its own: they are the pool's, and its forward runs between acquire and release.

The decoder layers make it in place of their MLP class while the model is built. Its projections are vLLM's, made on the
meta device, so that the GEMMs, the activation and their dispatch stay vLLM's, whatever the version.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from ..config import FFNSpec, TensorSpec, Unit
from ..errors import ConfigError, PoolClosedError
from ..pool import WeightPool

OP = "sidp::vllm_mlp"


@torch.library.custom_op(OP, mutates_args=())
def vllm_mlp(x: torch.Tensor, layer_name: str) -> torch.Tensor:
    """What compiled code calls: the MLP of that name in the engine that runs now, before the all-reduce. x [..., H]."""
    return get_forward_context().no_compile_layers[layer_name].compute(x)


@vllm_mlp.register_fake
def _(x: torch.Tensor, layer_name: str) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class PooledMLP:
    """Comes before vLLM's MLP class in the method resolution order; see the module's head."""

    def __init__(self, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        with torch.device("meta"):
            super().__init__(*args, prefix=prefix, **kwargs)
        self.layer_name = prefix
        self.pool: WeightPool | None = None
        self.layer = -1
        for projection in self.projections:
            if not isinstance(projection.quant_method, UnquantizedLinearMethod):
                raise ConfigError(
                    f"{prefix} is quantised ({type(projection.quant_method).__name__}): load_format='sidp' pools float32, "
                    f"bfloat16 and float16 weights"
                )
        # The all-reduce stays outside of the opaque operator, where the compiler can fuse it with what follows.
        self._reduces = bool(self.down_proj.reduce_results and self.down_proj.tp_size > 1)
        self.down_proj.reduce_results = False
        get_current_vllm_config().compilation_config.static_forward_context[prefix] = self

    @property
    def projections(self) -> tuple[nn.Module, nn.Module]:
        return self.gate_up_proj, self.down_proj

    def unit(self) -> Unit:
        """The pool's description of this rank's shard."""
        gate_up, down = (projection.weight for projection in self.projections)
        tensors = [
            TensorSpec("gate_up", tuple(gate_up.shape), gate_up.dtype, "rows", 2, "gate_up"),
            TensorSpec("down", tuple(down.shape), down.dtype, "cols", 1, "down"),
        ]
        biases = [projection.bias is not None for projection in self.projections]
        if biases[0]:
            tensors.append(TensorSpec("gate_up_bias", (gate_up.shape[0],), gate_up.dtype, "rows", 2, "gate_up_bias"))
        if biases[1]:
            tensors.append(TensorSpec("down_bias", (down.shape[0],), down.dtype, "none", 1, "down_bias"))
        hidden, inner = down.shape
        return Unit(tuple(tensors), FFNSpec(hidden, inner, "silu", bias=any(biases), dtype=down.dtype))

    def attach(self, pool: WeightPool, layer: int) -> None:
        """Points the projections at the layer's static addresses in a committed pool."""
        self.pool, self.layer = pool, layer
        views = pool.tensors(layer)
        for name, projection in zip(("gate_up", "down"), self.projections, strict=True):
            projection.weight = nn.Parameter(views[name], requires_grad=False)
            if projection.bias is not None:
                projection.bias = nn.Parameter(views[f"{name}_bias"], requires_grad=False)
        self._on_cpu = pool.device.type == "cpu"
        # Inside the operator nothing is compiled: take the fused kernel where there is one.
        self.act_fn._forward_method = self.act_fn.forward_native if self._on_cpu else self.act_fn.forward_cuda

    def detach(self) -> None:
        """The pool closes: nothing may point into its memory any more."""
        for projection in self.projections:
            for name, parameter in list(projection.named_parameters(recurse=False)):
                setattr(projection, name, nn.Parameter(torch.empty(0, dtype=parameter.dtype), requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.sidp.vllm_mlp(x, self.layer_name) if torch.compiler.is_compiling() else self.compute(x)
        return tensor_model_parallel_all_reduce(y) if self._reduces else y

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sum: x [..., H] -> [..., H], by WaS or CaS as the pool decides from the number of rows."""
        if self.pool is None:
            raise PoolClosedError(f"{self.layer_name} has no pool: its engine was not loaded with load_format='sidp'")
        return self.pool.run(self.layer, x, lambda _: self._own(x))

    def _own(self, x: torch.Tensor) -> torch.Tensor:
        if not self._on_cpu:
            return super().forward(x)
        # vLLM's GEMM on the CPU works on a packed copy of the weights: packed anew for every use, its results are
        # those of the engine without a pool, bit for bit.
        for projection in self.projections:
            dispatch_cpu_unquantized_gemm(projection, remove_weight=False)
        try:
            return super().forward(x)
        finally:
            for projection in self.projections:
                projection.cpu_linear = None


def _pooled(base: type) -> type:
    return type(f"Pooled{base.__name__}", (PooledMLP, base), {"__module__": __name__})


@contextmanager
def made_in_place_of(module: Any, name: str) -> Iterator[None]:
    """Inside, what ``module`` makes by ``name`` has its weights in a pool."""
    base = getattr(module, name)
    setattr(module, name, _pooled(base))
    try:
        yield
    finally:
        setattr(module, name, base)


def pooled_mlps(model: nn.Module) -> list[PooledMLP]:
    """The pooled MLPs of ``model`` in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, PooledMLP)]


def pool_of(model: nn.Module) -> WeightPool:
    """ConfigError where ``model`` was not loaded with load_format="sidp"."""
    pool = next((mlp.pool for mlp in pooled_mlps(model)), None)
    if pool is None:
        raise ConfigError("this engine has no pool: pass load_format='sidp', or set SIDP_VLLM=1")
    return pool

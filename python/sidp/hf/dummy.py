"""Models of a real shape with weights made up from a seed: for benchmarks, and for planning on a real device.

A weight depends on the seed and on its own name alone, so that all ranks, a pool's shares and a whole model agree. The
values are made on the device where they will be used; those of a GPU differ from those of a CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import PoolConfig
from ..errors import ConfigError
from ..pool import WeightPool
from .pooling import install
from .recognize import find_ffns


def dummy_pretrained(
    source: str, dtype: torch.dtype, group: Any = None, config: PoolConfig | None = None, seed: int = 0
) -> tuple[WeightPool, nn.Module]:
    """Collective: as `from_pretrained`, with made-up weights; a rank makes its share of the FFNs only.

    `source`: a folder with config.json, that file, or the name of one of `sidp plan`'s models.
    """
    config = PoolConfig() if config is None else config
    model = skeleton(source, dtype)
    ffns = find_ffns(model, allow_meta=True)
    with contextlib.ExitStack() as on_error:
        pool = on_error.enter_context(WeightPool([f.unit for f in ffns], group=group, config=config))
        for layer, ffn in enumerate(ffns):
            for spec in ffn.unit.tensors:
                if indices := pool.wants(layer, spec.name):
                    whole = made_up(f"{ffn.path}.{spec.name}", spec.shape, spec.dtype, pool.device, seed)
                    for index in indices:
                        pool.load_slice(layer, spec.name, index, whole[index])
            for _, module, leaf in ffn.parameters():
                module._parameters[leaf] = None
        pool.commit()
        fill(model, pool.device, seed)
        install(model, pool, ffns)
        on_error.pop_all()
    return pool, model


def dummy_model(source: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
    """The same model whole, on `device`."""
    model = skeleton(source, dtype)
    fill(model, device, seed)
    return model


def made_up(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """The weight called `name`: normal, scaled so that a matrix keeps the size of its input; ones for a norm's."""
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype, device=device)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, shape[-1] ** -0.5, generator=generator)


def model_config(source: str):
    """transformers' config of `source`. ConfigError where there is none or it is not a causal language model's."""
    from transformers import AutoConfig

    from ..planner.presets import preset

    known = preset(source)
    try:
        if known is not None:
            fields = {name: value for name, value in known.items() if name not in ("_name", "torch_dtype")}
            return AutoConfig.for_model(**fields, dtype=known["torch_dtype"])
        if not Path(source).exists():
            raise ConfigError(f"{source!r} is neither a folder with config.json nor a model that sidp plan knows")
        return AutoConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{source}: transformers cannot read its config ({error})") from error


def skeleton(source: str, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters on the meta device and its buffers on the CPU."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = model_config(source)
    try:
        with _parameters_on_meta(), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise ConfigError(f"{source}: transformers has no causal language model of its type ({error})") from error
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have no memory behind their parameters, and real buffers."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def fill(model: nn.Module, device: torch.device, seed: int) -> None:
    """Values for what is on the meta device, and everything onto `device`."""
    for path, module in model.named_modules():
        for leaf, param in module._parameters.items():
            if param is not None and param.is_meta:
                name = f"{path}.{leaf}" if path else leaf
                value = made_up(name, tuple(param.shape), param.dtype, device, seed)
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    if model.config.get_text_config().tie_word_embeddings:
        model.tie_weights()
    model.to(device)

"""Load a model so that a rank reads only its share of the FFN weights.

transformers builds the model on the meta device and loads what is not FFN itself. The FFN parameters are made absent
right after the model's __init__, so that its loader neither reads nor initialises them; this rank's share is then read
from the safetensors files into the pool, one tensor's part at a time. Nothing ever holds the whole model.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..config import PoolConfig
from ..errors import ConfigError, LayoutError, SidpError
from ..pool import WeightPool
from .agree import agreement
from .checkpoint import Checkpoint, resolve_folder
from .pooling import install, release_host_memory
from .recognize import FoundFFN, find_ffns

_HUB_KWARGS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
# What would change where weights come from or go to behind the pool's back.
_REFUSED_KWARGS = (
    "device_map", "quantization_config", "load_in_8bit", "load_in_4bit", "gguf_file", "state_dict", "tp_plan",
    "tp_size", "device_mesh", "distributed_config", "variant", "subfolder", "trust_remote_code", "adapter_kwargs",
    "offload_folder", "output_loading_info", "ignore_mismatched_sizes", "use_kernels", "fusion_config",
)  # fmt: skip


def from_pretrained(
    path: str | os.PathLike[str],
    group: Any = None,
    config: PoolConfig | None = None,
    dtype: torch.dtype | str | None = None,
    **hf_kwargs: Any,
) -> tuple[WeightPool, nn.Module]:
    """Collective: (pool, model) from a folder of safetensors or a hub id; each rank reads its share of the FFNs only.

    `dtype`: of the loaded weights; None takes the checkpoint's. `hf_kwargs` go to the model's own from_pretrained
    (attn_implementation, revision, ...). The model is in eval mode, frozen and pooled, as after `pool_model`.
    Raises ConfigError or LayoutError, naming file and tensor, before anything is allocated.
    """
    config = PoolConfig() if config is None else config
    with agreement(group, config) as others:
        loader = _Loader(path, dtype, dict(hf_kwargs), lambda: others.barrier("checkpoint checked"))
        model = loader.load_rest()
        release_host_memory()  # what transformers used on the way
        others.barrier("from_pretrained")
    with contextlib.ExitStack() as on_error:
        pool = on_error.enter_context(WeightPool([f.unit for f in loader.ffns], group=group, config=config))
        loader.load_share(pool)
        loader.checkpoint.close()
        pool.backup_from(loader.read_again)
        pool.commit()
        _to_device_of(model, pool)
        install(model, pool, loader.ffns)
        on_error.pop_all()
    return pool, model


class _Loader:
    """One checkpoint on its way into one model: what was found in the skeleton, and where its tensors lie."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        dtype: torch.dtype | str | None,
        hf_kwargs: dict[str, Any],
        checked: Callable[[], None],
    ) -> None:
        refused = [key for key in _REFUSED_KWARGS if hf_kwargs.get(key) is not None]
        if refused:
            raise ConfigError(
                f"sidp.from_pretrained takes no {', '.join(refused)}: it places the weights itself. Load with "
                "transformers and call sidp.pool_model instead."
            )
        hub = {key: hf_kwargs.pop(key) for key in _HUB_KWARGS if key in hf_kwargs}
        self.folder = resolve_folder(path, hub)
        self.checkpoint = Checkpoint(self.folder)
        self.model_class = _model_class(self.folder)
        self.ffns: list[FoundFFN] = []
        self._key_of: dict[str, str] = {}  # parameter of the model -> tensor in the checkpoint
        self._checked = checked  # called once the skeleton and the files are known to fit, before any weight is read
        self._kwargs = {"dtype": "auto" if dtype is None else dtype, **hf_kwargs}

    def load_rest(self) -> nn.Module:
        """The model with everything but its FFN weights, which are absent (None)."""
        ephemeral = _with_step_after_init(self.model_class, self._strip)
        try:
            model, info = ephemeral.from_pretrained(
                self.folder, output_loading_info=True, local_files_only=True, **self._kwargs
            )
        except SidpError:
            raise
        except Exception as error:  # whatever transformers raises on a bad folder or argument
            raise ConfigError(
                f"{self.folder}: transformers cannot load it ({type(error).__name__}: {error})."
            ) from error
        model.__class__ = self.model_class
        model.__dict__.pop("_keys_to_ignore_on_load_unexpected", None)
        missing = sorted(info["missing_keys"])
        if missing:
            raise ConfigError(
                f"{self.folder} lacks {len(missing)} tensors of {self.model_class.__name__}: {', '.join(missing[:4])}. "
                "Ranks would fill them with different random values: use a complete checkpoint."
            )
        return model

    def load_share(self, pool: WeightPool) -> None:
        """Read into `pool` what this rank keeps, a part of one tensor at a time."""
        for layer, ffn in enumerate(self.ffns):
            for spec in ffn.unit.tensors:
                key = self._key_of[f"{ffn.path}.{spec.name}"]
                for index in pool.wants(layer, spec.name):
                    pool.load_slice(layer, spec.name, index, self.checkpoint.read(key, index).to(spec.dtype))
            if pool.owns(layer):
                release_host_memory()  # malloc would keep some of the parts just read

    def read_again(self, layer: int, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """A part of an FFN's tensor from its file, long after loading: a rank was lost."""
        ffn = self.ffns[layer]
        spec = next(spec for spec in ffn.unit.tensors if spec.name == name)
        with contextlib.closing(Checkpoint(self.folder)) as checkpoint:
            return checkpoint.read(self._key_of[f"{ffn.path}.{name}"], index).to(spec.dtype)

    def _strip(self, model: nn.Module) -> None:
        """Runs on the meta skeleton: find the FFNs, check their tensors in the files, make them absent."""
        self.ffns = find_ffns(model, allow_meta=True)
        self._key_of = self._match(model)
        self._refuse_float32_islands(model)
        self._checked()
        names = [f"{f.path}.{spec.name}" for f in self.ffns for spec in f.unit.tensors]
        for ffn in self.ffns:
            for _, module, leaf in ffn.parameters():
                module._parameters[leaf] = None
                module._is_hf_initialized = True  # type: ignore[assignment]
            ffn.module._is_hf_initialized = True  # type: ignore[assignment]
        skipped = "|".join(re.escape(name) for name in {*names, *(self._key_of[name] for name in names)})
        ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        model._keys_to_ignore_on_load_unexpected = {*ignored, rf"^(?:.*\.)?(?:{skipped})$"}  # type: ignore[assignment]

    def _match(self, model: nn.Module) -> dict[str, str]:
        """Where the parameters of `model` lie in the checkpoint, by the renamings that transformers applies at load."""
        params = model.state_dict()
        found, converted = _renamed_keys(model, params, self.checkpoint.keys(), self._kwargs.get("key_mapping"))
        for ffn in self.ffns:
            for spec in ffn.unit.tensors:
                name = f"{ffn.path}.{spec.name}"
                if name in found:
                    continue
                if name in converted:
                    raise ConfigError(
                        f"{self.checkpoint.file_of(converted[name])}: {converted[name]} needs a conversion to become "
                        f"{name}, which sidp cannot do on a part of it. Load it with transformers and call "
                        "sidp.pool_model, or save it once in the new format with save_pretrained."
                    )
                raise ConfigError(
                    f"{self.folder} has no tensor for {name} (expected shape {spec.shape}). Use a complete "
                    f"checkpoint of {self.model_class.__name__}."
                )
        for name, key in found.items():
            if tuple(params[name].shape) != self.checkpoint.shape(key):
                raise LayoutError(
                    f"{self.checkpoint.file_of(key)}: {key} has shape {self.checkpoint.shape(key)}, expected "
                    f"{tuple(params[name].shape)} for {name}. config.json and weights do not belong together."
                )
        return found

    def _refuse_float32_islands(self, model: nn.Module) -> None:
        plan = getattr(model, "_get_dtype_plan", lambda dtype: {})(torch.float16)
        kept = [re.compile(pattern.replace("*", r"\w+")) for pattern in plan]
        for name in (f"{f.path}.{spec.name}" for f in self.ffns for spec in f.unit.tensors):
            if any(pattern.search(name) for pattern in kept):
                raise ConfigError(
                    f"{type(model).__name__} keeps {name} in float32 whatever the dtype, which sidp.from_pretrained "
                    "does not do. Load it with transformers and call sidp.pool_model instead."
                )


def _renamed_keys(
    model: Any, params: dict[str, torch.Tensor], keys: list[str], key_mapping: dict[str, str] | None
) -> tuple[dict[str, str], dict[str, str]]:
    """({parameter: checkpoint tensor} where they map one to one, {parameter: a tensor it is converted from})."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model, key_mapping) or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    found: dict[str, str] = {}
    converted: dict[str, str] = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, params)
        if name not in params and key in params:
            name, pattern = rename_source_key(key, [], [], prefix, params)
        if pattern is None:
            if name in params:
                found[name] = key
            continue
        converter = next(c for c in converters if pattern in c.source_patterns)
        first = converter.target_patterns[0]
        for target in converter.target_patterns:
            converted[name.replace(first, target)] = key
    return found, converted


def _with_step_after_init(cls: type, step: Callable[[nn.Module], None]) -> Any:
    """A subclass of `cls` that runs `step` on the instance at the end of its __init__; `cls` itself stays as it is."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        step(self)

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__, "__doc__": cls.__doc__})


def _model_class(folder: Any) -> Any:
    """The class that config.json names, or the causal language model of its type."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if (folder / "adapter_config.json").exists():
        raise ConfigError(f"{folder} holds a PEFT adapter; merge it into its base model and save that first.")
    if not (folder / "config.json").exists():
        raise ConfigError(f"{folder} has no config.json; expected a folder written by save_pretrained.")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # unknown model types, bad JSON, remote code
        raise ConfigError(f"{folder / 'config.json'}: transformers cannot read it ({error}).") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{folder} is quantised; sidp pools float32, bfloat16 and float16 weights. Use the original.")
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None and getattr(found, "can_generate", lambda: False)():
            return found
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} has no causal language model of type "
            f"{config.model_type!r}."
        )
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _to_device_of(model: nn.Module, pool: WeightPool) -> None:
    device = next(iter(pool.tensors(0).values())).device
    if device.type != "cpu":
        model.to(device)

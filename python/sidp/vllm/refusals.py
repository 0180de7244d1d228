"""What the plugin does not do, said before anything is allocated."""

from __future__ import annotations

import importlib
from typing import Any

from ..config import DTYPES
from ..errors import ConfigError
from .versions import UnsupportedVllmError

# Model class -> module and name of the class of its FFNs. (Mistral's decoder layer is Llama's.)
_LLAMA = ("vllm.model_executor.models.llama", "LlamaMLP")
MLPS = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": ("vllm.model_executor.models.qwen2", "Qwen2MLP"),
    "Qwen3ForCausalLM": ("vllm.model_executor.models.qwen3", "Qwen3MLP"),
}


def refuse(vllm_config: Any, model_config: Any) -> None:
    """ConfigError naming the first setting that the pool cannot go with."""
    parallel = vllm_config.parallel_config
    for refused, what, mend in (
        (model_config is not vllm_config.model_config, "a second model (a draft model)", "run one model"),
        (vllm_config.speculative_config, "speculative decoding", "leave speculative_config out"),
        (
            vllm_config.quant_config or model_config.quantization,
            f"quantisation ({model_config.quantization})",
            "use the model in float32, bfloat16 or float16",
        ),
        (vllm_config.lora_config, "LoRA", "merge the adapter into the model, or leave enable_lora out"),
        (model_config.enable_sleep_mode, "sleep mode", "leave enable_sleep_mode out: peers read this memory"),
        (parallel.enable_eplb, "expert load balancing (EPLB)", "leave enable_eplb out"),
        (parallel.enable_dbo, "dual-batch overlap", "leave enable_dbo out: one batch at a time walks the ring"),
        (_offloads(vllm_config), "weight offloading", "leave cpu_offload_gb and offload_group_size out"),
        (
            parallel.pipeline_parallel_size > 1,
            f"pipeline_parallel_size={parallel.pipeline_parallel_size}",
            "use tensor parallelism within an engine",
        ),
        (
            parallel.data_parallel_size > 1,
            f"data_parallel_size={parallel.data_parallel_size}",
            "start one engine a rank, with SIDP_VLLM_RANK and SIDP_VLLM_WORLD_SIZE",
        ),
        (
            model_config.dtype not in DTYPES,
            f"dtype {model_config.dtype}",
            "use float32, bfloat16 or float16",
        ),
    ):
        if refused:
            raise ConfigError(f"load_format='sidp' does not go with {what}: {mend}")


def mlp_class_of(model_class: type) -> tuple[Any, str]:
    """The module, and the name in it, by which the decoder layers of ``model_class`` reach the class of their FFNs.

    Raises:
        ConfigError: a model that is not pooled. UnsupportedVllmError: this vLLM's model is made in another way.
    """
    name = model_class.__name__
    expected = MLPS.get(name)
    if expected is None or not model_class.__module__.startswith("vllm.model_executor.models."):
        raise ConfigError(
            f"load_format='sidp' pools {', '.join(sorted(MLPS))}, not {model_class.__module__}.{name}: "
            f"run this model with another load_format"
        )
    module = importlib.import_module(expected[0])
    if not isinstance(getattr(module, expected[1], None), type):
        raise UnsupportedVllmError(f"{expected[0]} of this vLLM has no class {expected[1]}, from which {name} is made")
    return module, expected[1]


def _offloads(vllm_config: Any) -> bool:
    offload = vllm_config.offload_config
    return bool(offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size)

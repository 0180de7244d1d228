"""How each family of decoders spells its sizes, and which tensors it has besides the FFNs.

A family is a row of facts (biases, norms, fusing, names of fields); what differs from layer to layer or has experts is
refused by name. Every row is checked against the model that transformers builds from the same config.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import ConfigError
from .models import FFN, ModelShape, Weight

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Family:
    """The facts of one model_type. Biases and `tied` are True, False, or (field of the config, its default)."""

    names: dict[str, str] = field(default_factory=dict)  # our field -> the config's, where they differ
    gated: bool = True
    fused: bool = False
    transposed: bool = False
    qkv_bias: bool | tuple[str, bool] = False
    out_bias: bool | tuple[str, bool] = False
    ffn_bias: bool | tuple[str, bool] = False
    tied: bool = False
    norms: int = 2  # a layer
    norm_bias: bool = False
    final_norm: bool = True
    qk_norm: str = ""  # "head": one [head_dim] each for q and k; "full": over all their heads
    positions: tuple[str, int] | None = None  # field with the length of a learned position table, rows added to it
    head_bias: bool = False
    adapt: Callable[[Family, dict[str, Any]], Family] | None = None  # what depends on the config


def _opt(family: Family, config: dict[str, Any]) -> Family:
    if config.get("word_embed_proj_dim", config.get("hidden_size")) != config.get("hidden_size"):
        raise ConfigError(
            "this OPT has word_embed_proj_dim other than hidden_size (OPT-350m): sidp plan has no arithmetic for its "
            "projected embeddings"
        )
    if config.get("layer_norm_elementwise_affine", True) is False:
        family = replace(family, norms=0, final_norm=False)
    if not config.get("do_layer_norm_before", True) or config.get("_remove_final_layer_norm"):
        family = replace(family, final_norm=False)
    return family


def _falcon(family: Family, config: dict[str, Any]) -> Family:
    if config.get("alibi"):
        family = replace(family, positions=None)
    if config.get("new_decoder_architecture"):
        norms = 1 if config.get("num_ln_in_parallel_attn") == 1 else 2
        return replace(family, norms=norms, names={**family.names, "kv_heads": "num_kv_heads"})
    if config.get("multi_query", True):
        config["_kv_heads"] = 1
    else:
        config["_kv_heads"] = config.get("num_attention_heads", config.get("n_head"))
    return replace(
        family, norms=1 if config.get("parallel_attn", True) else 2, names={**family.names, "kv_heads": "_kv_heads"}
    )


def _stablelm(family: Family, config: dict[str, Any]) -> Family:
    if config.get("qk_layernorm"):
        raise ConfigError("StableLM with qk_layernorm has a norm for every head, which sidp plan does not count")
    return replace(family, norms=1) if config.get("use_parallel_residual") else family


def _cohere(family: Family, config: dict[str, Any]) -> Family:
    if config.get("use_qk_norm"):
        raise ConfigError("Cohere with use_qk_norm has a norm for every head, which sidp plan does not count")
    return family


_LLAMA = Family(qkv_bias=("attention_bias", False), out_bias=("attention_bias", False), ffn_bias=("mlp_bias", False))
_NO_FFN_BIAS = replace(_LLAMA, ffn_bias=False)
_PLAIN = Family(gated=False, norm_bias=True)
_GPT = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "granite": _LLAMA,
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": replace(_NO_FFN_BIAS, qk_norm="head"),
    "gemma": replace(_NO_FFN_BIAS, tied=True),
    "gemma2": replace(_NO_FFN_BIAS, tied=True, norms=4),
    "gemma3_text": replace(_NO_FFN_BIAS, tied=True, norms=4, qk_norm="head"),
    "phi3": Family(fused=True),
    "glm": Family(fused=True, qkv_bias=("attention_bias", True)),
    "olmo2": replace(_NO_FFN_BIAS, qk_norm="full"),
    "cohere": replace(_NO_FFN_BIAS, tied=True, norms=1, adapt=_cohere),
    "stablelm": Family(norm_bias=True, qkv_bias=("use_qkv_bias", False), adapt=_stablelm),
    "starcoder2": replace(
        _PLAIN, tied=True, qkv_bias=("use_bias", True), out_bias=("use_bias", True), ffn_bias=("use_bias", True)
    ),
    "nemotron": replace(
        _PLAIN,
        qkv_bias=("attention_bias", False),
        out_bias=("attention_bias", False),
        ffn_bias=("mlp_bias", False),
    ),
    "gpt2": replace(
        _PLAIN,
        names={**_GPT, "intermediate_size": "n_inner"},
        transposed=True,
        tied=True,
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        positions=("n_positions", 0),
    ),
    "gptj": replace(_PLAIN, names={**_GPT, "intermediate_size": "n_inner"}, norms=1, ffn_bias=True, head_bias=True),
    "gpt_neox": replace(_PLAIN, qkv_bias=("attention_bias", True), out_bias=("attention_bias", True), ffn_bias=True),
    "opt": replace(
        _PLAIN,
        names={"intermediate_size": "ffn_dim"},
        tied=True,
        qkv_bias=("enable_bias", True),
        out_bias=("enable_bias", True),
        ffn_bias=("enable_bias", True),
        positions=("max_position_embeddings", 2),
        adapt=_opt,
    ),
    "falcon": replace(
        _PLAIN,
        names={"intermediate_size": "ffn_hidden_size"},
        tied=True,
        qkv_bias=("bias", False),
        out_bias=("bias", False),
        ffn_bias=("bias", False),
        adapt=_falcon,
    ),
}
_INNER_IS_4H = {"gpt2", "gptj", "falcon"}

_REFUSED = {
    "bloom": "its FFN takes the residual and adds it itself, so it cannot be pooled",
    "mpt": "its FFN takes the residual and adds it itself, so it cannot be pooled",
    "bitnet": "its projections are ternary and packed when they are loaded",
    "gemma3n": "its FFNs cut activations by their own statistics and its layers carry extra per-layer inputs",
    "nemotron-nas": "its layers differ in attention and some have no FFN",
    "deci": "its layers differ in attention and some have no FFN",
    "openelm": "its layers differ in their numbers of heads",
}
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


def shape_of(config: dict[str, Any], name: str, dtype: str | None = None) -> ModelShape:
    """The shape that `config` (a config.json's object) describes. Raises ConfigError."""
    config = dict(config)
    family = _family(config, name)
    if family.adapt is not None:
        family = family.adapt(family, config)
    read = _Reader(config, family, name)
    hidden, layers, heads = (read.size(n) for n in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    kv_heads = read.size("num_key_value_heads", read.names.get("kv_heads"), default=heads)
    head_dim = read.size("head_dim", default=_head_dim(hidden, heads, name))
    if heads % kv_heads:
        raise ConfigError(f"{name}: {kv_heads} key/value heads do not divide its {heads} attention heads")
    ffns = tuple(
        FFN(hidden, inner, family.gated, read.flag(family.ffn_bias), family.fused, family.transposed)
        for inner in read.inner_sizes(hidden, layers)
    )
    vocabulary = read.size("vocab_size")
    return ModelShape(
        name=name,
        model_type=config["model_type"],
        dtype=_dtype(config, dtype, name),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=vocabulary,
        weights=_weights(family, read, hidden, layers, heads, kv_heads, head_dim, vocabulary),
        ffns=ffns,
        notes=_notes(config, ffns),
    )


def _weights(family, read, hidden, layers, heads, kv_heads, head_dim, vocabulary) -> tuple[Weight, ...]:
    bias = 1 if read.flag(family.qkv_bias) else 0
    norm = 2 * hidden if family.norm_bias else hidden
    weights = [
        Weight("embeddings", vocabulary, hidden, "rows"),
        Weight("attention", heads, head_dim * (hidden + bias), "rows", layers),  # q
        Weight("attention", kv_heads, head_dim * (hidden + bias), "kv", 2 * layers),  # k and v
        Weight("attention", heads, head_dim * hidden, "rows", layers),  # output, cut by its inputs
        Weight("norms", norm, count=family.norms * layers),
    ]
    if read.flag(family.out_bias):
        weights.append(Weight("attention", hidden, count=layers))
    if family.qk_norm == "head":
        weights.append(Weight("norms", head_dim, count=2 * layers))
    elif family.qk_norm == "full":
        weights.append(Weight("norms", heads, head_dim, "rows", layers))
        weights.append(Weight("norms", kv_heads, head_dim, "kv", layers))
    if family.final_norm:
        weights.append(Weight("norms", norm))
    if family.positions is not None:
        length, more = family.positions
        weights.append(Weight("embeddings", read.size(length) + more, hidden))
    if not read.flag(("tie_word_embeddings", family.tied)):
        weights.append(Weight("lm_head", vocabulary, hidden, "rows"))
    if family.head_bias:
        weights.append(Weight("lm_head", vocabulary, 1, "rows"))
    return tuple(weights)


class _Reader:
    """Fields of one config under the family's names, each checked."""

    def __init__(self, config: dict[str, Any], family: Family, name: str):
        self._config = config
        self._name = name
        self._type = config["model_type"]
        self.names = family.names

    def size(self, field: str, key: str | None = None, default: int | None = None) -> int:
        key = key or self.names.get(field, field)
        value = self._config.get(key)
        # transformers' own names work beside a family's older ones (n_embd and hidden_size)
        value = self._config.get(field) if value is None else value
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self._name}: its config has no {key!r}, which a {self._type} model needs; add it")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{self._name}: {key} must be an integer of 1 or more, got {value!r}")
        return value

    def inner_sizes(self, hidden: int, layers: int) -> list[int]:
        """The intermediate size of each layer; a list in the config means unequal layers."""
        key = self.names.get("intermediate_size", "intermediate_size")
        value = self._config.get(key)
        if not isinstance(value, list):
            return [self.size("intermediate_size", default=4 * hidden if self._type in _INNER_IS_4H else None)] * layers
        if len(value) != layers or not all(type(n) is int and n >= 1 for n in value):
            raise ConfigError(
                f"{self._name}: {key} is a list of {len(value)}, expected {layers} integers of 1 or more, one a layer"
            )
        return value

    def flag(self, fact: bool | tuple[str, bool]) -> bool:
        if isinstance(fact, bool):
            return fact
        key, default = fact
        value = self._config.get(key)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{self._name}: {key} must be true or false, got {value!r}")
        return default if value is None else value


def _family(config: dict[str, Any], name: str) -> Family:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError(f"{name}: its config has no 'model_type'; give the config.json that comes with the model")
    if kind in _REFUSED:
        raise ConfigError(f"{name} ({kind}) cannot be planned: {_REFUSED[kind]}")
    experts = next((n for n in _EXPERT_FIELDS if isinstance(config.get(n), int) and config[n] > 1), None)
    if experts is not None or "moe" in kind or kind == "mixtral":
        count = f"{config[experts]} " if experts else ""
        raise ConfigError(f"{name} ({kind}) is a mixture of {count}experts: sidp pools dense FFNs only")
    if config.get("quantization_config"):
        raise ConfigError(f"{name} ({kind}) is quantised: sidp pools float32, bfloat16 and float16 weights")
    if isinstance(config.get("text_config"), dict):
        raise ConfigError(f"{name} ({kind}) is multimodal: give the config of its language model (text_config) alone")
    if config.get("is_encoder_decoder"):
        raise ConfigError(f"{name} ({kind}) has an encoder: sidp plans decoders")
    if kind not in FAMILIES:
        raise ConfigError(
            f"{name}: model_type {kind!r} is unknown to sidp plan; it knows {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[kind]


def _head_dim(hidden: int, heads: int, name: str) -> int | None:
    return hidden // heads if hidden % heads == 0 else None


def _dtype(config: dict[str, Any], wanted: str | None, name: str) -> torch.dtype:
    text = wanted or config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if text not in _DTYPES:
        raise ConfigError(f"{name}: dtype {text!r} is not one of {', '.join(_DTYPES)}; choose one with --dtype")
    return _DTYPES[text]


def _notes(config: dict[str, Any], ffns: tuple[FFN, ...]) -> tuple[str, ...]:
    notes = []
    if len({ffn.inner for ffn in ffns}) > 1:
        notes.append("FFNs differ in size from layer to layer: ring slots have the size of the largest")
    windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
    if windowed:
        notes.append(
            f"some layers look back {config['sliding_window']} tokens only; KV cache is counted as if all kept all"
        )
    return tuple(notes)

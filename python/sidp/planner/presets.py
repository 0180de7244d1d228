"""Public configs of the paper's models, and of smaller ones for one GPU and where pooling gains little; sizes only."""

from __future__ import annotations

from typing import Any

_GQA_70B = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}

PRESETS: dict[str, dict[str, Any]] = {
    "Qwen3-32B": {
        **_QWEN3,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
    },
    "Llama-3.1-70B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "intermediate_size": 28672,
        "max_position_embeddings": 131072,
        **_GQA_70B,
    },
    "Qwen2.5-72B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "intermediate_size": 29568,
        "max_position_embeddings": 32768,
        **_GQA_70B,
    },
    "Llama-3.1-8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
    },
    "Qwen3-14B": {
        **_QWEN3,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "Qwen3-8B": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}


def preset(name: str) -> dict[str, Any] | None:
    """The config of that name; case, a hub's `owner/` in front and `-Instruct` at the end do not matter."""
    wanted = name.rsplit("/", 1)[-1].lower().removesuffix("-instruct")
    for known, config in PRESETS.items():
        if known.lower() == wanted:
            return {**config, "_name": known}
    return None

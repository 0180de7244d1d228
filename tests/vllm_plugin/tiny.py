"""Folders of small random models of the families that the plugin pools."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 320


def save_tiny(family: str, folder: Path, **changes) -> Path:
    import torch
    import transformers

    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,  # far from flat, so that greedy tokens mean something
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **changes,
    }
    config = getattr(transformers, f"{names[family]}Config")(**sizes)
    torch.manual_seed(hash_of(family))
    model = getattr(transformers, f"{names[family]}ForCausalLM")(config).to(torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def hash_of(text: str) -> int:
    return sum(text.encode())

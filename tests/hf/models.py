"""Tiny random models, one or two of every family that pools, and one of everything that is refused."""

from __future__ import annotations

import torch
import transformers

VOCAB = 97
_LAYERS, _HEADS, _HIDDEN, _INNER = 5, 4, 32, 48
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PLAIN = {"vocab_size": VOCAB, "num_hidden_layers": _LAYERS, "num_attention_heads": _HEADS, "hidden_size": _HIDDEN}
_LLAMA = {**_PLAIN, **_ENDS, "intermediate_size": _INNER, "num_key_value_heads": 2}
_HEAD8 = {**_LLAMA, "head_dim": 8}
_GPT2 = {"vocab_size": VOCAB, "n_layer": _LAYERS, "n_head": _HEADS, "n_embd": _HIDDEN, **_ENDS}

# family -> (config class, its arguments)
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "llama_bias_tied": ("LlamaConfig", {**_LLAMA, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", _HEAD8),
    "mistral": ("MistralConfig", _LLAMA),
    "gemma2": ("Gemma2Config", _HEAD8),
    "gemma3_text": ("Gemma3TextConfig", _HEAD8),
    "phi3": ("Phi3Config", _LLAMA),
    "glm": ("GlmConfig", _HEAD8),
    "gpt2": ("GPT2Config", _GPT2),
    "opt": (
        "OPTConfig",
        {**_PLAIN, **_ENDS, "ffn_dim": _INNER, "word_embed_proj_dim": _HIDDEN, "max_position_embeddings": 64},
    ),
    "falcon": ("FalconConfig", {**_PLAIN, **_ENDS, "parallel_attn": True}),
    "falcon_bias": ("FalconConfig", {**_PLAIN, **_ENDS, "parallel_attn": False, "bias": True}),
    "falcon_new": ("FalconConfig", {**_PLAIN, **_ENDS, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_neox": ("GPTNeoXConfig", {**_PLAIN, **_ENDS, "intermediate_size": _INNER}),
    "gptj": ("GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "stablelm": ("StableLmConfig", _LLAMA),
    "olmo2": ("Olmo2Config", _LLAMA),
    "starcoder2": ("Starcoder2Config", _LLAMA),
    "cohere": ("CohereConfig", _LLAMA),
    "granite": ("GraniteConfig", _LLAMA),
    "nemotron": ("NemotronConfig", _HEAD8),
}

_EXPERTS = {"num_experts_per_tok": 2}
# refused family -> (config class, its arguments, what the reason says)
REFUSED: dict[str, tuple[str, dict, str]] = {
    "mixtral": ("MixtralConfig", {**_LLAMA, **_EXPERTS, "num_local_experts": 4}, "mixture of experts"),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_HEAD8, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16},
        "mixture of experts",
    ),
    "gpt_oss": ("GptOssConfig", {**_HEAD8, **_EXPERTS, "num_local_experts": 4}, "mixture of experts"),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, "n_layer": 4, "n_head": 4, "hidden_size": _HIDDEN}, "residual"),
    "mpt": ("MptConfig", {"vocab_size": VOCAB, "n_layers": 4, "n_heads": 4, "d_model": _HIDDEN}, "residual"),
    "bitnet": ("BitNetConfig", _LLAMA, "ternary"),
    "ctrl": (
        "CTRLConfig",
        {"vocab_size": VOCAB, "n_layer": 4, "n_head": 4, "n_embd": 32, "dff": 48},
        "no decoder layer",
    ),
}


def config_of(family: str):
    name, arguments = (FAMILIES.get(family) or REFUSED[family])[:2]
    return getattr(transformers, name)(**arguments)


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """The same weights for the same seed, in every process; biases and norms random too, so that none is a no-op."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family), dtype=dtype).eval()
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:
                param.add_(0.1 * torch.randn_like(param))
    return model


def prompt(seed: int, rows: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def logits(model: torch.nn.Module, seed: int) -> torch.Tensor:
    return model(**prompt(seed)).logits


@torch.no_grad()
def answers(model: torch.nn.Module, seed: int, everything: bool = True) -> list[torch.Tensor]:
    """What must not change by pooling: logits and greedy tokens; with `everything` static cache and sampling too."""
    inputs = prompt(seed)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    out = [model(**inputs).logits, model.generate(**inputs, **greedy)]
    if not everything:
        return out
    out.append(model.generate(**inputs, **greedy, cache_implementation="static"))
    torch.manual_seed(seed)
    out.append(model.generate(**inputs, max_new_tokens=4, do_sample=True))
    return out

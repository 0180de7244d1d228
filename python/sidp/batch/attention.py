"""Attention of the paged engine on CUDA, by the flash kernel that torch itself has.

transformers' continuous batching wants the flash-attn package; without it, it falls back to one sdpa over all
sequences of a step with a mask of [queries, keys], whose time and memory grow with the square of the batch. torch has
the same kernel for sequences of unequal length, so that no further package is needed.
"""

from __future__ import annotations

import importlib.util

import torch

NAME = "sidp_flash"  # the engine goes by the "flash" in it: no masks, causal by itself
_LARGEST_HEAD = 256
_HALF = (torch.bfloat16, torch.float16)


def kind(model) -> str:
    """What a model's steps will use: "torch" (the kernel here), "package" (flash-attn) or "sdpa"."""
    if model.device.type != "cuda" or model.dtype not in _HALF or not getattr(model, "_supports_flash_attn", False):
        return "sdpa"
    if torch.cuda.get_device_capability(model.device) < (8, 0):
        return "sdpa"
    if importlib.util.find_spec("flash_attn") or importlib.util.find_spec("flash_attn_interface"):
        return "package"
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # A softmax with a cap or a sink is more than the kernel knows.
    plain = not getattr(config, "attn_logit_softcapping", None) and config.model_type != "gpt_oss"
    return "torch" if plain and width <= _LARGEST_HEAD else "sdpa"


def use_torch_flash(model) -> None:
    """Switch `model` to the kernel here; `kind` says whether that fits."""
    from transformers import AttentionInterface, PreTrainedModel

    known = AttentionInterface()
    name = f"paged|{NAME}" if "paged|flash_attention_2" in known else NAME  # older engines ask by the former
    AttentionInterface.register(name, varlen_attention)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # set_attn_implementation would look for a package of that name.
            module.config._attn_implementation_internal = name


def varlen_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' attention interface: query, key and value [1, heads, tokens, width] -> [1, tokens, heads, width].

    The keys and values of a step are those of its new tokens, together with what `cache` holds of the same sequences.
    """
    if "cu_seq_lens_q" not in kwargs:  # a forward of its own, beside the engine
        return _plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    cache = kwargs.get("cache")
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None) or 0
    layer_type = "sliding_attention" if window else "full_attention"
    if cache is not None:  # newer engines update the cache before they call
        key, value = cache.update(key, value, module.layer_idx, kwargs["read_index"], kwargs["write_index"])
    else:
        key, value = key.squeeze(0).transpose(0, 1), value.squeeze(0).transpose(0, 1)
    longest_query = kwargs["max_length_q"] if "max_length_q" in kwargs else kwargs["max_seqlen_q"]
    longest_key = kwargs["max_length_k"] if "max_length_k" in kwargs else kwargs["max_seqlen_k"]
    ends = kwargs["cu_seq_lens_k"]
    if isinstance(ends, dict):
        ends = ends[layer_type]
    if isinstance(longest_key, dict):
        longest_key = longest_key[layer_type]
    output = _flash(
        query.squeeze(0).transpose(0, 1).contiguous(),
        key.contiguous(),
        value.contiguous(),
        kwargs["cu_seq_lens_q"].to(torch.int32),
        ends.to(torch.int32),
        longest_query,
        longest_key,
        scaling,
        window,
    )
    return output.unsqueeze(0), None


def _plain(module, query, key, value, attention_mask, **kwargs):
    from transformers import AttentionInterface

    return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)


def _flash(query, key, value, query_ends, key_ends, longest_query, longest_key, scale, window):
    """[tokens, heads, width] each; causal from the last key on, within `window` keys (0: all)."""
    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        query_ends,
        key_ends,
        longest_query,
        longest_key,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=window - 1 if window else None,
        window_size_right=0 if window else None,
    )[0]

"""Attention of the paged engine on CUDA, by the flash kernel that torch itself has.

transformers' continuous batching wants the flash-attn package; without it, it falls back to one sdpa over all
sequences of a step with a mask of [queries, keys], whose time and memory grow with the square of the batch. torch has
the same kernel for sequences of unequal length, so that no further package is needed.

Steps with prompts in them copy the keys and values they need out of the cache first. Decode steps read them where they
lie, by kernels of this project (paged_attention.py): torch's knows no page tables.
"""

from __future__ import annotations

import importlib.util
import threading

import torch

from . import paged_attention

NAME = "sidp_flash"  # the engine goes by the "flash" in it: no masks, causal by itself
_LARGEST_HEAD = 256
_HALF = (torch.bfloat16, torch.float16)
DECODE_PAGE = 128  # keys of a page where decode steps read the cache in place


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


def decodes_in_place(model) -> bool:
    """Whether decode steps of this model may read the cache where it lies: the kernel here, and every layer sees all keys."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    everything = kinds == {"full_attention"} and not getattr(config, "sliding_window", None)
    return everything and kind(model) == "torch" and paged_attention.available()


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
    if kwargs.get("block_table") is not None:
        return _decode(module, query, key, value, cache, scaling, kwargs), None
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None) or 0
    layer_type = "sliding_attention" if window else "full_attention"
    if cache is not None:  # newer engines update the cache before they call
        if step.single:
            _set_single_apart(cache, module.layer_idx, kwargs)
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
    query, query_ends, key_ends = (
        query.squeeze(0).transpose(0, 1),
        kwargs["cu_seq_lens_q"].to(torch.int32),
        ends.to(torch.int32),
    )
    single = None
    if "single_index" in kwargs:
        keys, values, count = kwargs["k_cache"], kwargs["v_cache"], step.single
        index = kwargs["single_index"]
        single = paged_attention.attend(query[:count], keys, values, index, key_ends, step.single_longest, scaling)
        query, query_ends, key_ends = query[count:], query_ends[count:] - count, key_ends[count:] - step.single_keys
    output = _flash(
        query.contiguous(), key.contiguous(), value.contiguous(), query_ends, key_ends, longest_query, longest_key,
        scaling, window,
    )  # fmt: skip
    return (output if single is None else torch.cat((single, output))).unsqueeze(0), None


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


# ---- requests with one new token --------------------------------------------------------------------------------------


class _Step(threading.local):
    """Of the step that is running; batch/decode.py says.

    Attributes:
        longest: keys of a decode step's longest request, or more; 0 where it is not known.
        single: requests with one new token in a step with prompts, which come before the prompts; 0 leaves them to the kernel of
            the prompts. single_keys, single_longest: keys of all of them and of the longest.
    """

    longest = 0
    single = single_keys = single_longest = 0


step = _Step()


def _decode(module, query, key, value, cache, scaling, kwargs):
    table, ends = kwargs["block_table"], kwargs["cu_seq_lens_k"]
    if "k_cache" in kwargs:  # newer engines say which pages are this layer's
        keys, values = kwargs["k_cache"], kwargs["v_cache"]
    else:
        group, keys, values = _pages(cache, module.layer_idx)
        table = table[group]
    query, key, value = (new.squeeze(0).transpose(0, 1) for new in (query, key, value))  # [requests, heads, width]
    paged_attention.append(key, value, keys, values, table, ends)
    longest = step.longest or table.shape[1] * keys.shape[1]
    return paged_attention.attend(query, keys, values, table, ends, longest, scaling).unsqueeze(0)


def _pages(cache, layer: int):
    """(group of the layer, its keys, its values), [pages, tokens of a page, KV heads, width] each."""
    if hasattr(cache, "layer_to_allocator"):
        allocator = cache.layer_to_allocator[layer]
        return allocator.index, *allocator.get_cache_for_block_table(layer)
    group, place = cache.layer_index_to_group_indices[layer]
    shape = (-1, cache.block_size, cache.num_key_value_heads, cache.head_dim)
    return group, cache.key_cache[place].view(*shape), cache.value_cache[place].view(*shape)


def copy_prompts_alone(cache) -> None:
    """Have the engine's cache copy keys and values out only for the prompts of a step; decodes_in_place says for which models.

    A kernel that works on blocks of queries is slow with one query: 58 requests with some 800 keys each, beside prompts, took more
    than a third of the time of the layer's products.
    """
    if not hasattr(cache, "layer_to_allocator"):
        return  # older engines leave the update to varlen_attention
    update = cache.update

    def update_for_prompts(key, value, layer, kwargs):
        if step.single:
            _set_single_apart(cache, layer, kwargs)
        return update(key, value, layer, kwargs)

    cache.update = update_for_prompts


def _set_single_apart(cache, layer: int, kwargs) -> None:
    group, keys, values = _pages(cache, layer)
    index = kwargs["read_index"][group]
    if index.numel() > step.single_keys:  # empty where no request of the step has anything in the cache
        kwargs.update(read_index={group: index[step.single_keys :]}, single_index=index, k_cache=keys, v_cache=values)

"""Attention of the paged engine on CUDA, by the flash kernel that torch itself has.

transformers' continuous batching wants the flash-attn package; without it, it falls back to one sdpa over all
sequences of a step with a mask of [queries, keys], whose time and memory grow with the square of the batch. torch has
the same kernel for sequences of unequal length, so that no further package is needed.

Steps with prompts in them copy the keys and values they need out of the cache first. Decode steps read them where they
lie: torch's kernel knows no page tables, but a sequence's keys may begin anywhere and end early (`seqused_k`), so every
page of every request is a sequence of its own, and the parts are joined by their log-sum-exps.
"""

from __future__ import annotations

import importlib.util
import threading
from dataclasses import dataclass

import torch

NAME = "sidp_flash"  # the engine goes by the "flash" in it: no masks, causal by itself
_LARGEST_HEAD = 256
_HALF = (torch.bfloat16, torch.float16)
DECODE_PAGE = 128  # keys of a page where decode steps read the cache in place: two turns of the kernel's loop


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
    return kind(model) == "torch" and kinds == {"full_attention"} and not getattr(config, "sliding_window", None)


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


# ---- decode steps -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodePlan:
    """Where one step's requests, one new token each, find their keys; the same for all layers.

    int32 on the device, but where said. Rows that only fill up the batch have no keys; they read and write what row 0 does.

    Attributes:
        starts: [requests * pages + 1] first key of every page, in tokens of the cache.
        used: [requests * pages] keys of it that are a request's.
        query_ends: [requests * pages + 1] of `group` queries a page each.
        slots: [requests] int64, where the new token's key goes. real: [requests] bool.
    """

    pages: int
    group: int
    starts: torch.Tensor
    used: torch.Tensor
    query_ends: torch.Tensor
    slots: torch.Tensor
    real: torch.Tensor


def plan_decode(table: torch.Tensor, key_ends: torch.Tensor, pages: int, page: int, group: int) -> DecodePlan:
    """`table` [requests, any] int32 pages of each request; `key_ends` [requests + 1] sums of keys, the new ones included."""
    lengths = key_ends.diff().to(torch.int32)
    real = lengths > 0
    table = torch.where(real.unsqueeze(1), table, table[:1])
    lengths = torch.where(real, lengths, lengths[:1])
    first = torch.arange(pages, device=table.device, dtype=torch.int32) * page
    used = (lengths.unsqueeze(1) - first).clamp(0, page).flatten()
    starts = (table[:, :pages].clamp(min=0) * page).flatten()
    last = lengths - 1
    slots = table.gather(1, (last // page).long().unsqueeze(1)).squeeze(1) * page + last % page
    ends = torch.arange(used.numel() + 1, device=table.device, dtype=torch.int32) * group
    return DecodePlan(pages, group, torch.cat((starts, starts[:1])), used, ends, slots.long(), real)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: DecodePlan, page: int, scale: float):
    """[requests, heads, width] queries over keys and values [tokens of the cache, KV heads, width], as `plan` has them."""
    requests, heads, width = query.shape
    kv_heads = keys.shape[1]
    # The queries that share a key head are the tokens of a sequence: one page is read once for all of them.
    by_group = query.view(requests, 1, kv_heads, plan.group, width).transpose(2, 3)
    by_page = by_group.expand(requests, plan.pages, plan.group, kv_heads, width).reshape(-1, kv_heads, width)
    parts, log_sums = _flash_pages(by_page, keys, values, plan, page, scale)
    if plan.pages == 1:
        return parts.view(requests, plan.group, kv_heads, width).transpose(1, 2).reshape(requests, heads, width)
    return join(parts, log_sums, plan).transpose(1, 2).reshape(requests, heads, width)


def _flash_pages(query, keys, values, plan: DecodePlan, page: int, scale: float):
    return torch.ops.aten._flash_attention_forward(
        query,
        keys,
        values,
        plan.query_ends,
        plan.starts,
        plan.group,
        page,
        0.0,
        False,
        False,
        scale=scale,
        seqused_k=plan.used,
    )[:2]


def join(parts: torch.Tensor, log_sums: torch.Tensor, plan: DecodePlan) -> torch.Tensor:
    """Of results over single pages, [requests * pages * group, KV heads, width], those over all: [requests, group, KV heads,
    width]. `log_sums` [KV heads, requests * pages * group] are the logarithms of the softmax's denominators.
    """
    kv_heads, width = parts.shape[1:]
    parts = parts.view(-1, plan.pages, plan.group, kv_heads, width)
    log_sums = log_sums.view(kv_heads, -1, plan.pages, plan.group).permute(1, 2, 3, 0)
    log_sums = log_sums.masked_fill((plan.used == 0).view(-1, plan.pages, 1, 1), float("-inf"))  # the kernel says +inf
    weights = log_sums.softmax(dim=1).unsqueeze(-1)
    return (parts * weights).sum(dim=1).to(parts.dtype)


class _Step(threading.local):
    """Of the decode step that is running: pages of the longest request (batch/decode.py says), and the plan of its layers."""

    pages = 0
    plan: DecodePlan | None = None
    layer = 0


step = _Step()


def _decode(module, query, key, value, cache, scaling, kwargs):
    table, ends = kwargs["block_table"], kwargs["cu_seq_lens_k"]
    if "k_cache" in kwargs:  # newer engines say which pages are this layer's
        keys, values = kwargs["k_cache"], kwargs["v_cache"]
    else:
        group, place = cache.layer_index_to_group_indices[module.layer_idx]
        shape = (-1, cache.block_size, cache.num_key_value_heads, cache.head_dim)
        keys, values = cache.key_cache[place].view(*shape), cache.value_cache[place].view(*shape)
        table = table[group]
    page = keys.shape[1]
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    if step.plan is None or module.layer_idx <= step.layer:
        step.plan = plan_decode(table, ends, step.pages or table.shape[1], page, query.shape[1] // keys.shape[1])
    step.layer = module.layer_idx
    for kept, new in ((keys, key), (values, value)):
        new = new.squeeze(0).transpose(0, 1)  # [requests, KV heads, width]
        kept.index_copy_(0, step.plan.slots, torch.where(step.plan.real.view(-1, 1, 1), new, new[:1]))
    return attend(query.squeeze(0).transpose(0, 1), keys, values, step.plan, page, scaling).unsqueeze(0)

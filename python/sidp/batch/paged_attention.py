"""Attention of requests with one new token each, whose keys and values are read where the paged cache has them.

Triton kernels, which torch brings on CUDA. Such attention is bound by reading the cache, so the query heads that share a
key head are computed together, from one reading; tl.dot wants 16 rows, so up to 16 of them cost nothing. A batch too small
to fill the GPU is cut: several programs read parts of a request's keys, and a second kernel joins what they found by their
log-sum-exps (the parts' softmaxes, weighted by their shares of the whole denominator).
"""

from __future__ import annotations

import functools
import logging
import os
import shutil

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch without CUDA come without it
    triton = None

logger = logging.getLogger(__name__)

_KEYS = 64  # of a turn of the loop
_LEAST_ROWS = 16  # of tl.dot
_PROGRAMS = 512  # enough for all SMs of any GPU, several on each
_MOST_PARTS = 64
_LOG2_E = 1.4426950408889634


@functools.cache
def available() -> bool:
    """Whether the kernels can be compiled here: Triton, and the C compiler that its launchers need."""
    if triton is None:
        return False
    if os.environ.get("CC") or any(shutil.which(name) for name in ("gcc", "clang", "cc")):
        return True
    logger.warning(
        "sidp: no C compiler for Triton (CC, gcc, clang, cc): decode steps copy keys and values before they read them"
    )
    return False


if triton is not None:

    @triton.jit
    def _append_kernel(
        new_keys, new_values, keys, values, table, ends,
        new_row, new_head, value_row, value_head, page_stride, token, head, table_row,
        PAGE: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
    ):  # fmt: skip
        row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        length = (tl.load(ends + row + 1) - tl.load(ends + row)).to(tl.int32)
        if length > 0:
            last = length - 1
            page = tl.load(table + row * table_row + last // PAGE).to(tl.int64)
            lane = tl.arange(0, LANES)
            here = page * page_stride + last % PAGE * token + kv_head * head + lane
            new_key = tl.load(new_keys + row * new_row + kv_head * new_head + lane, mask=lane < WIDTH)
            new_value = tl.load(new_values + row * value_row + kv_head * value_head + lane, mask=lane < WIDTH)
            tl.store(keys + here, new_key, mask=lane < WIDTH)
            tl.store(values + here, new_value, mask=lane < WIDTH)

    @triton.jit(do_not_specialize=["parts", "share"])
    def _attend_kernel(
        query, keys, values, table, ends, output, log_sums, scale,
        query_row, query_head, page_stride, token, head, table_row, heads, share, parts,
        PAGE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
        KEYS: tl.constexpr, INDEXED: tl.constexpr,
    ):  # fmt: skip
        row, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
        first = tl.load(ends + row)
        length = (tl.load(ends + row + 1) - first).to(tl.int32)
        begin, end = part * share, tl.minimum(length, (part + 1) * share)
        in_group, lane, key = tl.arange(0, ROWS), tl.arange(0, LANES), tl.arange(0, KEYS)
        queries = in_group < GROUP
        q_head = kv_head * GROUP + in_group
        q = tl.load(
            query + row * query_row + q_head[:, None] * query_head + lane[None, :],
            mask=queries[:, None] & (lane < WIDTH)[None, :], other=0.0,
        )  # fmt: skip
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, LANES], tl.float32)
        for at in range(begin, end, KEYS):
            # The keys of a turn lie in one page, one after the other.
            if INDEXED:
                place = tl.load(table + first + at).to(tl.int64) * token
            else:
                place = tl.load(table + row * table_row + at // PAGE).to(tl.int64) * page_stride + at % PAGE * token
            offset = place + key[:, None] * token + kv_head * head + lane[None, :]
            there = (at + key < end)[:, None] & (lane < WIDTH)[None, :]
            k = tl.load(keys + offset, mask=there, other=0.0)
            v = tl.load(values + offset, mask=there, other=0.0)
            # Powers of two: `scale` has log2(e) in it.
            scores = tl.dot(q, tl.trans(k)) * scale
            scores = tl.where((at + key < end)[None, :], scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            weights = tl.exp2(scores - new_largest[:, None])
            shrink = tl.exp2(largest - new_largest)
            total = total * shrink + tl.sum(weights, 1)
            sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
            largest = new_largest
        # Rows that only fill up the batch have no keys, and a part may lie behind the last one.
        some = tl.where(total > 0, total, 1.0)
        place = (row * heads + q_head) * parts + part
        tl.store(
            output + place[:, None] * WIDTH + lane[None, :], (sums / some[:, None]).to(output.dtype.element_ty),
            mask=queries[:, None] & (lane < WIDTH)[None, :],
        )  # fmt: skip
        if parts > 1:
            tl.store(log_sums + place, largest + tl.log2(some), mask=queries)

    @triton.jit(do_not_specialize=["parts"])
    def _join_kernel(
        found, log_sums, output, parts, MOST_PARTS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr
    ):
        place, part, lane = tl.program_id(0).to(tl.int64), tl.arange(0, MOST_PARTS), tl.arange(0, LANES)
        sums = tl.load(log_sums + place * parts + part, mask=part < parts, other=float("-inf"))
        largest = tl.max(sums, 0)
        weights = tl.exp2(sums - tl.where(largest == float("-inf"), 0.0, largest))
        total = tl.sum(weights, 0)
        values = tl.load(
            found + (place * parts + part)[:, None] * WIDTH + lane[None, :],
            mask=(part < parts)[:, None] & (lane < WIDTH)[None, :], other=0.0,
        )  # fmt: skip
        joined = tl.sum(values * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
        tl.store(output + place * WIDTH + lane, joined.to(output.dtype.element_ty), mask=lane < WIDTH)


def append(new_keys, new_values, keys, values, table, ends) -> None:
    """Writes each request's newest key and value, [requests, KV heads, width], to where its last token belongs.

    Args:
        keys, values: the cache, [pages, tokens of a page, KV heads, width], alike in memory and contiguous by width.
        table: [requests, any] int32, the pages of each request in order.
        ends: [requests + 1] sums of the requests' keys, the new ones included; a row without keys only fills up the batch,
            and nothing is written for it.
    """
    rows, kv_heads, width = new_keys.shape
    _append_kernel[rows, kv_heads](
        new_keys, new_values, keys, values, table, ends,
        *new_keys.stride()[:2], *new_values.stride()[:2], *keys.stride()[:3], table.stride(0),
        PAGE=keys.shape[1], WIDTH=width, LANES=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip


def attend(query, keys, values, table, ends, longest: int, scale: float) -> torch.Tensor:
    """softmax(scale q k^T) v of each request's query, [requests, heads, width], over all of its keys; zeros in rows without any.

    Args:
        keys, values, ends: as `append` has them; pages of 16, 32 or a multiple of 64 tokens.
        table: as `append` has it; or, in one dimension, the place in the cache of every key of every request, in tokens.
        longest: keys of the longest request, or more.
    """
    rows, heads, width = query.shape
    _, page, kv_heads, _ = keys.shape
    pages = -(-longest // page)
    parts = max(1, min(_PROGRAMS // (rows * kv_heads), pages, _MOST_PARTS))
    share = -(-pages // parts) * page
    parts = -(-pages * page // share)
    joined = torch.empty((rows, heads, width), dtype=query.dtype, device=query.device)
    found, log_sums = joined, joined
    if parts > 1:
        found = torch.empty((rows, heads, parts, width), dtype=torch.float32, device=query.device)
        log_sums = torch.empty((rows, heads, parts), dtype=torch.float32, device=query.device)
    lanes = max(_LEAST_ROWS, triton.next_power_of_2(width))
    indexed = table.dim() == 1
    _attend_kernel[rows, kv_heads, parts](
        query, keys, values, table, ends, found, log_sums, scale * _LOG2_E,
        *query.stride()[:2], *keys.stride()[:3], 0 if indexed else table.stride(0), heads, share, parts,
        PAGE=page, GROUP=heads // kv_heads, ROWS=max(_LEAST_ROWS, triton.next_power_of_2(heads // kv_heads)), WIDTH=width,
        LANES=lanes, KEYS=min(_KEYS, page), INDEXED=indexed, num_warps=4, num_stages=3,
    )  # fmt: skip
    if parts > 1:
        _join_kernel[(rows * heads,)](found, log_sums, joined, parts, MOST_PARTS=_MOST_PARTS, WIDTH=width, LANES=lanes)
    return joined

"""Attention of a few queries to a long memory. The memory is split, so that a few heads occupy a whole GPU.

A program reads its part of a head's keys and values once, for all queries of the video. If there are several parts,
each stores its result in float32, and a second kernel adds them up, weighted by their shares of Σ exp. A program that
starts early prefetches its keys and values while the queries are still being computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mplug2_fast.kernels._launch import Kernel, cdiv, given, multiprocessors, power_of_2
from mplug2_fast.kernels._tuning import Config
from mplug2_fast.kernels.attention import attend, constants, load_rows, scale, sizes, small, store_rows, strides

_WAVES = 6
"""Programs per multiprocessor: enough loads in flight to saturate the memory bandwidth."""
_STEP, _SHORTEST = 64, 64
"""The size of a part is a multiple of the first and at least the second: adding up shorter parts takes longer than
reading them."""
_MAX_PARTS = 64
"""Parts that the second kernel can hold in registers."""
_MAX_TILE = 64
"""Queries per program."""


_FETCHED = tl.constexpr(256)
"""Keys and values of a part that are prefetched before the queries are ready."""


@triton.jit
def _fetch(states, row, begin, end, WIDTH: tl.constexpr):
    """Prefetches the first rows from `begin` on into the L2 cache, in lines of 128 bytes."""
    LINES: tl.constexpr = (WIDTH * states.dtype.element_ty.primitive_bitwidth + 1023) // 1024
    place = tl.minimum(begin + tl.arange(0, _FETCHED), end - 1).to(tl.int64)[:, None] * row
    place += tl.arange(0, LINES)[None, :] * (WIDTH // LINES)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [states + place], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def beam_attention_part(
    query, key, value, mask, out, logsum, q_len, k_len, heads, part_len, parts,
    query_batch, query_row, query_head, key_batch, key_row, key_head, value_batch, value_row, value_head,
    mask_batch, mask_row, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LOGSUM: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Queries of a head and one part of its keys.

    If WHOLE, there is one part, and `out` and `logsum` are the operator's. Otherwise they are
    `(batch·heads, q_len, parts, HEAD_DIM)` and `(batch·heads, q_len, parts)`.
    """
    tiles = tl.cdiv(q_len, BLOCK_M)
    part = tl.program_id(0) % parts
    first = tl.program_id(0) // parts % tiles * BLOCK_M
    slot = (tl.program_id(0) // (parts * tiles)).to(tl.int64)
    batch, head = slot // heads, slot % heads
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    begin = part * part_len
    end = tl.minimum(begin + part_len, k_len)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        _fetch(key, key_row, begin, end, BLOCK_D)
        _fetch(value, value_row, begin, end, BLOCK_D)
        tl.extra.cuda.gdc_wait()
    row = first + tl.arange(0, BLOCK_M)
    there = row < q_len
    queries = query + batch * query_batch + head * query_head
    q = load_rows(queries, first, query_row, there, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    result, log = attend(
        q, key, value, mask + batch * mask_batch, row, begin, begin + (end - begin) // BLOCK_N * BLOCK_N, end,
        key_row, value_row, mask_row, scale,
        BLOCK_M, BLOCK_N, TAIL, HEAD_DIM, BLOCK_D, HAS_MASK, False, PRECISION,
    )  # fmt: skip
    if WHOLE:
        results = out + (batch * q_len * heads + head) * HEAD_DIM
        store_rows(results, first, heads * HEAD_DIM, there, result, BLOCK_M, HEAD_DIM, BLOCK_D)
        if HAS_LOGSUM:
            tl.store(logsum + slot * q_len + row, tl.where(log == float("-inf"), float("inf"), log), there)
    else:
        place = slot * q_len * parts + part
        store_rows(out + place * HEAD_DIM, first, parts * HEAD_DIM, there, result, BLOCK_M, HEAD_DIM, BLOCK_D)
        tl.store(logsum + place + row * parts, log, there)


@triton.jit
def beam_attention_merge(
    partial, shares, out, logsum, q_len, heads, parts,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_LOGSUM: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of one query of a head per program."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0).to(tl.int64)
    slot, row = program // q_len, program % q_len
    part, channel = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    share = tl.load(shares + program * parts + part, part < parts, float("-inf"))
    highest = tl.max(share, axis=0)
    weights = tl.exp2(share - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weights, axis=0)
    there = (part < parts)[:, None] & (channel < HEAD_DIM)[None, :]
    places = partial + (program * parts + part[:, None]) * HEAD_DIM + channel[None, :]
    divisor = tl.where(total > 0, total, 1.0)
    result = tl.sum(tl.load(places, there, 0.0) * weights[:, None], axis=0) / divisor
    place = (slot // heads * q_len + row) * heads + slot % heads
    tl.store(out + place * HEAD_DIM + channel, result, channel < HEAD_DIM)
    if HAS_LOGSUM:
        tl.store(logsum + program, tl.where(total > 0, highest + tl.log2(divisor), float("inf")))


def _configs(constants: Mapping[str, Any], capability: int) -> list[Config]:
    tail = 32
    if small(constants):
        tiles, tail = [(32, 8, 2)], 16
    elif constants["BLOCK_M"] * constants["BLOCK_D"] <= 16 * 64:
        tiles = [(64, 2, 4), (64, 4, 4), (64, 4, 3), (32, 2, 4)]
    else:
        tiles = [(64, 4, 2), (64, 4, 3)]
    return [Config({"BLOCK_N": keys, "TAIL": tail}, warps, stages) for keys, warps, stages in tiles]


_part = Kernel(beam_attention_part, _configs, Config({"BLOCK_N": 32, "TAIL": 16}), early=True)
_merge = Kernel(beam_attention_merge, [Config(num_warps=4)], Config(), early=True)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    logsum: Tensor | None = None,
) -> None:
    """The same as `attention.forward` without `causal`, for few queries. The parts of a head run in parallel."""
    batch, q_len, heads, head_dim = query.shape
    k_len = key.shape[1]
    if out.numel() == 0:
        return
    tile = min(power_of_2(q_len, 16), _MAX_TILE)
    programs = batch * heads * cdiv(q_len, tile)
    part_len = part_length(k_len, programs, multiprocessors(query.device))
    parts = max(1, cdiv(k_len, part_len))
    whole, has_logsum = parts == 1, logsum is not None
    partial, shares = out, given(logsum, out)
    if not whole:
        partial = out.new_empty((batch * heads, q_len, parts, head_dim), dtype=torch.float32)
        shares = out.new_empty((batch * heads, q_len, parts), dtype=torch.float32)
    _part(
        lambda meta: (programs * parts,),
        query, key, value, given(mask, query), partial, shares, q_len, k_len, heads, part_len, parts,
        *strides(query, key, value, mask), scale(query),
        key=(*sizes(query, key), power_of_2(part_len)),
        HAS_LOGSUM=has_logsum,
        WHOLE=whole,
        BLOCK_M=tile,
        **constants(query, mask),
    )  # fmt: skip
    if not whole:
        _merge(
            lambda meta: (batch * heads * q_len,),
            partial, shares, out, given(logsum, out), q_len, heads, parts,
            HEAD_DIM=head_dim,
            BLOCK_D=power_of_2(head_dim, 16),
            HAS_LOGSUM=has_logsum,
            BLOCK_P=power_of_2(parts),
        )  # fmt: skip


def part_length(k_len: int, programs: int, multiprocessors: int) -> int:
    """Keys per part: enough parts for `_WAVES` programs per multiprocessor, unless parts would be too many or short."""
    parts = max(1, min(_WAVES * multiprocessors // programs, k_len // _SHORTEST, _MAX_PARTS))
    return cdiv(max(1, cdiv(k_len, parts)), _STEP) * _STEP

"""Attention of short sequences without masks: a program holds all keys and values of a head in shared memory.

It processes the head's queries tile by tile and computes all scores of a tile at once. Keys and values are read once
per head, and the softmax needs no rescaling. Image sequences have a few tokens more than a whole number of blocks. The
remaining keys are a separate product. For the remaining queries, keys are the rows of the product, because tensor cores
multiply 64 rows at a time but any number of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mplug2_fast.kernels._launch import Kernel, capability, cdiv, given, interpreted, multiprocessors
from mplug2_fast.kernels._tuning import Config
from mplug2_fast.kernels.attention import load_rows, scale, sizes, store_rows, strides

LEFT = 16
"""Most queries or keys beyond whole blocks that are computed separately."""
MAX_KEYS = 256 + LEFT
"""Registers hold the scores of 64 queries with this many keys."""
# Triton 3.9 spills some of the scores to local memory.
_HELD: bool = interpreted() or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


@triton.jit
def _highest(scores, others, scale, AXIS: tl.constexpr, BLOCKS: tl.constexpr, KEYS_LEFT: tl.constexpr):
    """The maximum of the scaled scores, of whole blocks and of the remaining keys, along AXIS."""
    peak = tl.max(scores[0], axis=AXIS)
    for block in tl.static_range(1, BLOCKS):
        peak = tl.maximum(peak, tl.max(scores[block], axis=AXIS))
    if KEYS_LEFT:
        peak = tl.maximum(peak, tl.max(others, axis=AXIS))
    return peak * scale


@triton.jit
def _queries_left(
    query, k, v, k_left, v_left, out, logsum, there, beyond, first, q_len, heads, query_row, scale,
    HEAD_DIM: tl.constexpr, BLOCKS: tl.constexpr, BOUNDED: tl.constexpr, KEYS_LEFT: tl.constexpr,
    QUERIES_LEFT: tl.constexpr, HAS_LOGSUM: tl.constexpr,
):  # fmt: skip
    """The remaining queries, from `first` on. Keys are the rows of the scores."""
    row = first + tl.arange(0, QUERIES_LEFT)
    q = load_rows(query, first, query_row, row < q_len, QUERIES_LEFT, HEAD_DIM, HEAD_DIM, False)
    scores = ()
    for block in tl.static_range(BLOCKS):
        product = tl.dot(k[block], q.T)
        if BOUNDED and block == BLOCKS - 1:
            product = tl.where(there[:, None], product, float("-inf"))
        scores += (product,)
    others = scores[0]
    if KEYS_LEFT:
        others = tl.where(beyond[:, None], tl.dot(k_left, q.T), float("-inf"))
    peak = _highest(scores, others, scale, 0, BLOCKS, KEYS_LEFT)
    total = tl.zeros((QUERIES_LEFT,), tl.float32)
    acc = tl.zeros((HEAD_DIM, QUERIES_LEFT), tl.float32)
    for block in tl.static_range(BLOCKS):
        weights = tl.exp2(tl.fma(scores[block], scale, -peak[None, :]))
        total += tl.sum(weights, axis=0)
        acc = tl.dot(v[block].T, weights.to(v_left.dtype), acc)
    if KEYS_LEFT:
        weights = tl.exp2(tl.fma(others, scale, -peak[None, :]))
        total += tl.sum(weights, axis=0)
        acc = tl.dot(v_left.T, weights.to(v_left.dtype), acc)
    acc *= (1.0 / total)[None, :]
    store_rows(out, first, heads * HEAD_DIM, row < q_len, acc.T, QUERIES_LEFT, HEAD_DIM, HEAD_DIM)
    if HAS_LOGSUM:
        tl.store(logsum + row, peak + tl.log2(total), row < q_len)


@triton.jit
def attention_short(
    query, key, value, out, logsum, q_len, k_len, heads,
    query_batch, query_row, query_head, key_batch, key_row, key_head, value_batch, value_row, value_head, scale,
    HEAD_DIM: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDED: tl.constexpr,
    KEYS_LEFT: tl.constexpr, QUERIES_LEFT: tl.constexpr, HAS_LOGSUM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The keys are BLOCKS blocks; if BOUNDED, the last one may be incomplete. KEYS_LEFT and QUERIES_LEFT are how many
    keys and queries are computed separately, rounded up, or 0."""
    slot = tl.program_id(0).to(tl.int64)
    batch, head = slot // heads, slot % heads
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    out += (batch * q_len * heads + head) * HEAD_DIM
    column = tl.arange(0, BLOCK_N)
    there = (BLOCKS - 1) * BLOCK_N + column < k_len
    # All loads are issued before the first one is waited for.
    k, v = (), ()
    for block in tl.static_range(BLOCKS):
        if BOUNDED and block == BLOCKS - 1:
            k += (load_rows(key, block * BLOCK_N, key_row, there, BLOCK_N, HEAD_DIM, HEAD_DIM, False),)
            v += (load_rows(value, block * BLOCK_N, value_row, there, BLOCK_N, HEAD_DIM, HEAD_DIM, False),)
        else:
            k += (load_rows(key, block * BLOCK_N, key_row, there, BLOCK_N, HEAD_DIM, HEAD_DIM, True),)
            v += (load_rows(value, block * BLOCK_N, value_row, there, BLOCK_N, HEAD_DIM, HEAD_DIM, True),)
    beyond, k_left, v_left = there, k[0], v[0]
    if KEYS_LEFT:
        beyond = BLOCKS * BLOCK_N + tl.arange(0, KEYS_LEFT) < k_len
        k_left = load_rows(key, BLOCKS * BLOCK_N, key_row, beyond, KEYS_LEFT, HEAD_DIM, HEAD_DIM, False)
        v_left = load_rows(value, BLOCKS * BLOCK_N, value_row, beyond, KEYS_LEFT, HEAD_DIM, HEAD_DIM, False)
    whole = q_len
    if QUERIES_LEFT:
        whole = q_len // BLOCK_M * BLOCK_M
        _queries_left(
            query, k, v, k_left, v_left, out, logsum + slot * q_len, there, beyond, whole, q_len, heads, query_row,
            scale, HEAD_DIM, BLOCKS, BOUNDED, KEYS_LEFT, QUERIES_LEFT, HAS_LOGSUM,
        )  # fmt: skip
    for first in range(0, whole, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        q = load_rows(query, first, query_row, row < q_len, BLOCK_M, HEAD_DIM, HEAD_DIM, QUERIES_LEFT > 0)
        scores = ()
        for block in tl.static_range(BLOCKS):
            product = tl.dot(q, k[block].T)
            if BOUNDED and block == BLOCKS - 1:
                product = tl.where(there[None, :], product, float("-inf"))
            scores += (product,)
        others = scores[0]
        if KEYS_LEFT:
            others = tl.where(beyond[None, :], tl.dot(q, k_left.T), float("-inf"))
        peak = _highest(scores, others, scale, 1, BLOCKS, KEYS_LEFT)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
        for block in tl.static_range(BLOCKS):
            weights = tl.exp2(tl.fma(scores[block], scale, -peak[:, None]))
            total += tl.sum(weights, axis=1)
            acc = tl.dot(weights.to(v_left.dtype), v[block], acc)
        if KEYS_LEFT:
            weights = tl.exp2(tl.fma(others, scale, -peak[:, None]))
            total += tl.sum(weights, axis=1)
            acc = tl.dot(weights.to(v_left.dtype), v_left, acc)
        acc *= (1.0 / total)[:, None]
        store_rows(out, first, heads * HEAD_DIM, row < q_len, acc, BLOCK_M, HEAD_DIM, HEAD_DIM)
        if HAS_LOGSUM:
            tl.store(logsum + slot * q_len + row, peak + tl.log2(total), row < q_len)


_short = Kernel(
    attention_short,
    [Config({"BLOCK_M": rows}, warps, stages) for rows, warps, stages in ((64, 4, 2), (64, 4, 1))],
    Config({"BLOCK_M": 64}),
)


def serves(query: Tensor, key: Tensor) -> bool:
    """Whether `forward` supports the call, and there are enough heads and keys to occupy the device.

    It needs compute capability 9.0, whose tensor cores read operands from shared memory and multiply any number of
    columns. Elsewhere the registers would overflow.
    """
    batch, q_len, heads, head_dim = query.shape
    k_len = key.shape[1]
    return (
        _HELD
        and query.dtype in (torch.bfloat16, torch.float16)
        and head_dim == 64
        and capability(query.device) in (0, 90)
        and batch * heads >= multiprocessors(query.device)
        and q_len >= 64
        and 96 <= k_len <= MAX_KEYS
    )


def forward(query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsum: Tensor | None = None) -> None:
    """The same as `attention.forward` without masks, for calls that `serves` accepts."""
    batch, q_len, heads, head_dim = query.shape
    k_len = key.shape[1]
    block = 128 if k_len % 128 <= LEFT else 64
    left = k_len % block if k_len % block <= LEFT else 0
    blocks = cdiv(k_len - left, block)
    _short(
        lambda meta: (batch * heads,),
        query, key, value, out, given(logsum, out), q_len, k_len, heads,
        *strides(query, key, value, None)[:-2], scale(query),
        key=sizes(query, key),
        HEAD_DIM=head_dim,
        BLOCKS=blocks,
        BLOCK_N=block,
        BOUNDED=k_len < blocks * block,
        KEYS_LEFT=LEFT if left else 0,
        # Beyond whole tiles of both 64 and 128 queries.
        QUERIES_LEFT=LEFT if 0 < q_len % 128 <= LEFT else 0,
        HAS_LOGSUM=logsum is not None,
    )  # fmt: skip

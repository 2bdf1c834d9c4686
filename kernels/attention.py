"""Flash attention, forward and backward. The matrix of scores is computed in registers, one tile at a time.

Whole blocks of keys (in `attention_backward_key`, of queries) need no mask. The remainder, and the diagonal of causal
attention, are processed in masked steps of TAIL, so that 257 tokens cost at most 257 + 31 instead of 257 + 63. With 64
channels per head, exponentials take a GPU as long as the products. They are therefore powers of 2, with the scale
folded into a multiply-add, and tiles are small enough for several programs per multiprocessor: one computes products
while another computes exponentials.

The forward saves log2 Σ exp(score) of each query, infinity if it sees no key. exp2(score - that) is the weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mplug2_fast.kernels._launch import Kernel, cdiv, given, power_of_2
from mplug2_fast.kernels._product import precision_of
from mplug2_fast.kernels._tuning import Config


@triton.jit
def wide(size):
    """The size in 64 bits, even if the compiler made it a constant."""
    return tl.zeros((), tl.int64) + size


@triton.jit
def load_rows(base, first, stride, there, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
              ALL: tl.constexpr):  # fmt: skip
    """Rows first to first + BLOCK of a head `(BLOCK, BLOCK_D)`. Rows not `there` are zeros; ALL skips the test."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    pointers = base + first * wide(stride) + tl.arange(0, BLOCK).to(tl.int64)[:, None] * stride + channel
    if ALL and HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    if ALL:
        return tl.load(pointers, channel < HEAD_DIM, 0.0)
    return tl.load(pointers, there[:, None] & (channel < HEAD_DIM), 0.0)


@triton.jit
def store_rows(base, first, stride, there, value, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    channel = tl.arange(0, BLOCK_D)[None, :]
    pointers = base + first * wide(stride) + tl.arange(0, BLOCK).to(tl.int64)[:, None] * stride + channel
    tl.store(pointers, value, there[:, None] & (channel < HEAD_DIM))


@triton.jit
def visible_keys(mask, column, end, mask_stride, HAS_MASK: tl.constexpr):
    there = column < end
    if HAS_MASK:
        there = there & (tl.load(mask + column.to(tl.int64) * mask_stride, there, 0) != 0)
    return there


@triton.jit
def _attend(
    acc, highest, total, q, keys, values, mask, row, start, end, key_stride, value_stride, mask_stride, scale,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over BLOCK keys."""
    column = start + tl.arange(0, BLOCK)
    masked: tl.constexpr = BOUNDED or HAS_MASK
    there = visible_keys(mask, column, end, mask_stride, HAS_MASK) if masked else column < end
    k = load_rows(keys, start, key_stride, there, BLOCK, HEAD_DIM, BLOCK_D, not masked)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if masked:
        seen = there[None, :]
        if CAUSAL and BOUNDED:
            seen = seen & (column[None, :] <= row[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    peak = tl.maximum(highest, tl.max(scores, axis=1) * scale)
    base = tl.where(peak == float("-inf"), 0.0, peak) if masked else peak
    weights = tl.exp2(tl.fma(scores, scale, -base[:, None]))
    shrink = tl.exp2(highest - base)
    v = load_rows(values, start, value_stride, there, BLOCK, HEAD_DIM, BLOCK_D, not masked)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, peak, total * shrink + tl.sum(weights, axis=1)


@triton.jit
def attend(
    q, keys, values, mask, row, begin, whole, end, key_stride, value_stride, mask_stride, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """softmax(q·keysᵀ)·values for BLOCK_M queries and the keys from begin to end.

    Up to `whole` there are whole blocks that every query sees. Returns the result in float32, and log2 Σ exp
    `(BLOCK_M,)`, -inf for a query that sees no key.
    """
    if PRECISION is not None:
        # In float32 queries are scaled instead of scores, so that the largest weight is exactly 1, without rounding.
        q *= scale
        scale = 1.0
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, whole, BLOCK_N):
        acc, highest, total = _attend(
            acc, highest, total, q, keys, values, mask, row, start, end, key_stride, value_stride, mask_stride, scale,
            BLOCK_N, HEAD_DIM, BLOCK_D, HAS_MASK, CAUSAL, False, PRECISION,
        )  # fmt: skip
    for start in tl.range(whole, end, TAIL, num_stages=1):
        acc, highest, total = _attend(
            acc, highest, total, q, keys, values, mask, row, start, end, key_stride, value_stride, mask_stride, scale,
            TAIL, HEAD_DIM, BLOCK_D, HAS_MASK, CAUSAL, True, PRECISION,
        )  # fmt: skip
    divisor = tl.where(total > 0, total, 1.0)
    return acc * (1.0 / divisor)[:, None], highest + tl.log2(divisor)


@triton.jit
def attention_forward(
    query, key, value, mask, out, logsum, q_len, k_len, heads,
    query_batch, query_row, query_head, key_batch, key_row, key_head, value_batch, value_row, value_head,
    mask_batch, mask_row, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_LOGSUM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_M queries of a head. Programs of a head follow each other and share its keys in L2."""
    blocks = tl.cdiv(q_len, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = slot // heads, slot % heads
    row = first + tl.arange(0, BLOCK_M)
    queries = query + batch * query_batch + head * query_head
    q = load_rows(queries, first, query_row, row < q_len, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    whole = k_len // BLOCK_N * BLOCK_N
    end = k_len
    if CAUSAL:
        whole = first // BLOCK_N * BLOCK_N
        end = tl.minimum(first + BLOCK_M, k_len)
    result, log = attend(
        q, key + batch * key_batch + head * key_head, value + batch * value_batch + head * value_head,
        mask + batch * mask_batch, row, 0, whole, end, key_row, value_row, mask_row, scale,
        BLOCK_M, BLOCK_N, TAIL, HEAD_DIM, BLOCK_D, HAS_MASK, CAUSAL, PRECISION,
    )  # fmt: skip
    results = out + (batch * q_len * heads + head) * HEAD_DIM
    store_rows(results, first, heads * HEAD_DIM, row < q_len, result, BLOCK_M, HEAD_DIM, BLOCK_D)
    if HAS_LOGSUM:
        tl.store(logsum + slot * q_len + row, tl.where(log == float("-inf"), float("inf"), log), row < q_len)


@triton.jit
def _query_gradient(
    acc, q, grad_rows, logs, deltas, keys, values, mask, row, start, end, key_stride, value_stride, mask_stride, scale,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column = start + tl.arange(0, BLOCK)
    masked: tl.constexpr = BOUNDED or HAS_MASK
    there = visible_keys(mask, column, end, mask_stride, HAS_MASK) if masked else column < end
    k = load_rows(keys, start, key_stride, there, BLOCK, HEAD_DIM, BLOCK_D, not masked)
    v = load_rows(values, start, value_stride, there, BLOCK, HEAD_DIM, BLOCK_D, not masked)
    weights = tl.exp2(tl.fma(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, -logs[:, None]))
    if masked:
        seen = there[None, :]
        if CAUSAL and BOUNDED:
            seen = seen & (column[None, :] <= row[:, None])
        weights = tl.where(seen, weights, 0.0)
    weights *= tl.dot(grad_rows, tl.trans(v), input_precision=PRECISION) - deltas[:, None]
    return tl.dot(weights.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit
def attention_backward_query(
    query, key, value, mask, out, grad, logsum, delta, dquery, q_len, k_len, heads,
    query_batch, query_row, query_head, key_batch, key_row, key_head, value_batch, value_row, value_head,
    mask_batch, mask_row, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_M queries. It stores Σ grad·out of each query in `delta` for `attention_backward_key`."""
    blocks = tl.cdiv(q_len, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = slot // heads, slot % heads
    row = first + tl.arange(0, BLOCK_M)
    there = row < q_len
    dense = (batch * q_len * heads + head) * HEAD_DIM
    grad_rows = load_rows(grad + dense, first, heads * HEAD_DIM, there, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    results = load_rows(out + dense, first, heads * HEAD_DIM, there, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    if PRECISION is None:
        deltas = tl.sum(grad_rows.to(tl.float32) * results.to(tl.float32), axis=1)
    else:
        # Computed as grad·value is, from which it is subtracted, so that both round alike: for a query that sees one
        # key the two are equal.
        product = tl.dot(grad_rows, tl.trans(results), input_precision=PRECISION)
        same = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_M)[None, :]
        deltas = tl.sum(tl.where(same, product, 0.0), axis=1)
    tl.store(delta + slot * q_len + row, deltas, there)
    logs = tl.load(logsum + slot * q_len + row, there, float("inf"))
    queries = query + batch * query_batch + head * query_head
    q = load_rows(queries, first, query_row, there, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    keys = key + batch * key_batch + head * key_head
    values = value + batch * value_batch + head * value_head
    masks = mask + batch * mask_batch
    whole = k_len // BLOCK_N * BLOCK_N
    end = k_len
    if CAUSAL:
        whole = first // BLOCK_N * BLOCK_N
        end = tl.minimum(first + BLOCK_M, k_len)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, whole, BLOCK_N):
        acc = _query_gradient(
            acc, q, grad_rows, logs, deltas, keys, values, masks, row, start, end, key_row, value_row, mask_row, scale,
            BLOCK_N, HEAD_DIM, BLOCK_D, HAS_MASK, CAUSAL, False, PRECISION,
        )  # fmt: skip
    for start in tl.range(whole, end, TAIL, num_stages=1):
        acc = _query_gradient(
            acc, q, grad_rows, logs, deltas, keys, values, masks, row, start, end, key_row, value_row, mask_row, scale,
            TAIL, HEAD_DIM, BLOCK_D, HAS_MASK, CAUSAL, True, PRECISION,
        )  # fmt: skip
    acc *= scale * 0.6931471805599453  # scale holds log2(e)
    store_rows(dquery + dense, first, heads * HEAD_DIM, there, acc, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_gradients(
    dk, dv, k, v, queries, grads, logsum, delta, column, start, q_len, query_stride, grad_stride, scale,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIAGONAL: tl.constexpr,
    BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores are transposed, `(keys, queries)`, because they are the left operand of both products. A row past the end
    has an infinite logsum and therefore no weight."""
    row = start + tl.arange(0, BLOCK)
    there = row < q_len
    q = load_rows(queries, start, query_stride, there, BLOCK, HEAD_DIM, BLOCK_D, not BOUNDED)
    grad_rows = load_rows(grads, start, grad_stride, there, BLOCK, HEAD_DIM, BLOCK_D, not BOUNDED)
    logs = tl.load(logsum + row, there, float("inf")) if BOUNDED else tl.load(logsum + row)
    deltas = tl.load(delta + row, there, 0.0) if BOUNDED else tl.load(delta + row)
    weights = tl.exp2(tl.fma(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, -logs[None, :]))
    if DIAGONAL:
        weights = tl.where(column[:, None] <= row[None, :], weights, 0.0)
    dv = tl.dot(weights.to(v.dtype), grad_rows, dv, input_precision=PRECISION)
    weights *= tl.dot(v, tl.trans(grad_rows), input_precision=PRECISION) - deltas[None, :]
    return tl.dot(weights.to(k.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit
def attention_backward_key(
    query, key, value, mask, grad, logsum, delta, dkey, dvalue, q_len, k_len, heads,
    query_batch, query_row, query_head, key_batch, key_row, key_head, value_batch, value_row, value_head,
    mask_batch, mask_row, dkey_batch, dkey_row, dkey_head, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_N keys. Gradients of padding are set to zero at the end; no other row depends on them."""
    blocks = tl.cdiv(k_len, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_N
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = slot // heads, slot % heads
    column = first + tl.arange(0, BLOCK_N)
    there = column < k_len
    seen = visible_keys(mask + batch * mask_batch, column, k_len, mask_row, HAS_MASK)
    keys, values = key + batch * key_batch + head * key_head, value + batch * value_batch + head * value_head
    k = load_rows(keys, first, key_row, seen, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    v = load_rows(values, first, value_row, seen, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    queries = query + batch * query_batch + head * query_head
    grads = grad + (batch * q_len * heads + head) * HEAD_DIM
    grad_row = heads * HEAD_DIM
    logs, deltas = logsum + slot * q_len, delta + slot * q_len
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.minimum(first + BLOCK_N, q_len)
        for start in tl.range(first, begin, TAIL, num_stages=1):
            dk, dv = _key_gradients(
                dk, dv, k, v, queries, grads, logs, deltas, column, start, q_len, query_row, grad_row, scale,
                TAIL, HEAD_DIM, BLOCK_D, True, True, PRECISION,
            )  # fmt: skip
    whole = begin + (q_len - begin) // BLOCK_M * BLOCK_M
    for start in range(begin, whole, BLOCK_M):
        dk, dv = _key_gradients(
            dk, dv, k, v, queries, grads, logs, deltas, column, start, q_len, query_row, grad_row, scale,
            BLOCK_M, HEAD_DIM, BLOCK_D, False, False, PRECISION,
        )  # fmt: skip
    for start in tl.range(whole, q_len, TAIL, num_stages=1):
        dk, dv = _key_gradients(
            dk, dv, k, v, queries, grads, logs, deltas, column, start, q_len, query_row, grad_row, scale,
            TAIL, HEAD_DIM, BLOCK_D, False, True, PRECISION,
        )  # fmt: skip
    dk *= scale * 0.6931471805599453  # scale holds log2(e)
    if HAS_MASK:
        dk = tl.where(seen[:, None], dk, 0.0)
        dv = tl.where(seen[:, None], dv, 0.0)
    place = batch * dkey_batch + head * dkey_head
    store_rows(dkey + place, first, dkey_row, there, dk, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_rows(dvalue + place, first, dkey_row, there, dv, BLOCK_N, HEAD_DIM, BLOCK_D)


# For float32 without tensor cores, and for heads with unaligned rows. Larger tiles would overflow the registers.
_SMALL = Config({"BLOCK_M": 32, "BLOCK_N": 32, "TAIL": 16}, num_warps=8, num_stages=2)


def small(constants: Mapping[str, Any]) -> bool:
    return constants["PRECISION"] is not None or constants["HEAD_DIM"] % 8 != 0


def _forward_configs(constants: Mapping[str, Any], capability: int) -> list[Config]:
    if small(constants):
        return [_SMALL]
    if constants["BLOCK_D"] > 64:
        return _tiles((64, 64, 4, 3), (128, 64, 8, 2), *[(128, 64, 8, 3)] * (capability >= 90))
    plain = not (constants["HAS_MASK"] or constants["CAUSAL"])
    return _tiles((64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 2), *[(128, 64, 4, 3), (128, 128, 8, 2)] * plain)


def _query_configs(constants: Mapping[str, Any], capability: int) -> list[Config]:
    if small(constants):
        return [_SMALL]
    if constants["BLOCK_D"] > 64:
        return _tiles((64, 64, 8, 2), *[(128, 64, 8, 2)] * (capability >= 90))
    return _tiles((64, 64, 4, 3), (128, 64, 8, 3), *[(64, 128, 8, 2)] * (capability >= 90))


def _key_configs(constants: Mapping[str, Any], capability: int) -> list[Config]:
    if small(constants):
        return [_SMALL]
    if constants["BLOCK_D"] > 64:
        return _tiles((32, 64, 8, 2), *[(32, 128, 8, 2), (64, 128, 8, 2)] * (capability >= 100))
    if capability < 90 and constants["CAUSAL"]:
        return _tiles((32, 64, 4, 2))
    return _tiles((64, 64, 4, 3), (64, 128, 8, 3), (64, 128, 8, 2))


def _tiles(*sizes: tuple[int, int, int, int]) -> list[Config]:
    """Configurations from (queries per tile, keys per tile, warps, stages)."""
    return [Config({"BLOCK_M": m, "BLOCK_N": n, "TAIL": 32}, warps, stages) for m, n, warps, stages in sizes]


# Small enough for several blocks and several tail steps within a hundred keys.
_INTERPRETED = Config({"BLOCK_M": 32, "BLOCK_N": 32, "TAIL": 16})
_forward = Kernel(attention_forward, _forward_configs, _INTERPRETED)
_backward_query = Kernel(attention_backward_query, _query_configs, _INTERPRETED)
_backward_key = Kernel(attention_backward_key, _key_configs, _INTERPRETED)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    out: Tensor,
    logsum: Tensor | None = None,
) -> None:
    """softmax(query·keyᵀ / √head_dim)·value into `out`, log2 Σ exp into `logsum`.

    Args:
        query, key, value: `(batch, tokens, heads, head_dim)`, of one dtype; the channels of a head are contiguous.
        mask: `(batch, k_len)` uint8, zero for padding.
        out: `(batch, q_len, heads·head_dim)`, and logsum `(batch, heads, q_len)` float32, contiguous.
    """
    batch, q_len, heads, _ = query.shape
    if out.numel() == 0:
        return
    _forward(
        lambda meta: (cdiv(q_len, meta["BLOCK_M"]) * batch * heads,),
        query, key, value, given(mask, query), out, given(logsum, out), q_len, key.shape[1], heads,
        *strides(query, key, value, mask), scale(query),
        key=sizes(query, key),
        HAS_LOGSUM=logsum is not None,
        CAUSAL=causal,
        **constants(query, mask),
    )  # fmt: skip


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    out: Tensor,
    logsum: Tensor,
    grad: Tensor,
    dquery: Tensor,
    dkey: Tensor | None,
    dvalue: Tensor | None,
) -> None:
    """Gradients of `forward` from `grad`, the contiguous gradient of `out`.

    Args:
        dquery: of query's shape, contiguous. dkey, dvalue: of key's shape, both of the same strides, or both None.
    """
    batch, q_len, heads, _ = query.shape
    k_len = key.shape[1]
    delta = torch.empty_like(logsum)
    shared = {"key": sizes(query, key), "CAUSAL": causal, **constants(query, mask)}
    if query.numel():
        _backward_query(
            lambda meta: (cdiv(q_len, meta["BLOCK_M"]) * batch * heads,),
            query, key, value, given(mask, query), out, grad, logsum, delta, dquery, q_len, k_len, heads,
            *strides(query, key, value, mask), scale(query), **shared,
        )  # fmt: skip
    if dkey is not None and dvalue is not None and key.numel():
        _backward_key(
            lambda meta: (cdiv(k_len, meta["BLOCK_N"]) * batch * heads,),
            query, key, value, given(mask, query), grad, logsum, delta, dkey, dvalue, q_len, k_len, heads,
            *strides(query, key, value, mask), *dkey.stride()[:3], scale(query), **shared,
        )  # fmt: skip


def strides(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    tokens = (stride for tensor in (query, key, value) for stride in tensor.stride()[:3])
    return (*tokens, *((0, 0) if mask is None else mask.stride()))


def constants(query: Tensor, mask: Tensor | None) -> dict[str, Any]:
    return {
        "HEAD_DIM": query.shape[-1],
        "BLOCK_D": power_of_2(query.shape[-1], 16),
        "HAS_MASK": mask is not None,
        "PRECISION": precision_of(query.dtype),
    }


def sizes(query: Tensor, key: Tensor) -> tuple[int, ...]:
    """The key for tuning: the number of heads and the lengths of both sequences, rounded up to powers of 2."""
    return tuple(power_of_2(size) for size in (query.shape[0] * query.shape[2], query.shape[1], key.shape[1]))


def scale(query: Tensor) -> float:
    """The scale of scores that are exponents of 2."""
    return query.shape[-1] ** -0.5 * math.log2(math.e)

"""Multi-head attention of whole sequences, self or cross."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from mplug2_fast.ops.runtime import attention_packages, cpu, triton
from mplug2_fast.ops.runtime.backend import Backend
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.spec import Product, Spec, normal
from mplug2_fast.ops.scaled_dot_product import Attend, attend, attend_any_order

MAX_HEAD_DIM = 256
"""Largest head of the native kernel."""
MAX_TRITON_HEAD_DIM = 128
"""Largest head of the Triton kernels. 256 channels would leave no room for tiles."""


class Arguments(NamedTuple):
    query: Annotated[Tensor, "(batch, q_len, heads, head_dim)"]
    key: Annotated[Tensor, "(batch, k_len, heads, head_dim)"]
    value: Annotated[Tensor, "(batch, k_len, heads, head_dim)"]
    key_padding_mask: Annotated[Tensor | None, "(batch, k_len)"]
    causal: bool


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    causal: bool,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """softmax(query·keyᵀ / √head_dim)·value with the full matrix of scores. `dropout` is applied to the softmax."""
    mask = _visible(query, key, key_padding_mask, causal)
    key, value = without_padding(key, value, key_padding_mask)
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    scores = query @ key.transpose(-1, -2) * scale_of(query.shape[-1])
    if mask is None:
        weights = scores.softmax(dim=-1)
    else:  # a query that sees no key gets zeros
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).masked_fill(~mask, 0)
    weights = weights if dropout is None else dropout(weights)
    return (weights @ value).transpose(1, 2).flatten(2)


def scale_of(head_dim: int) -> float:
    """1 / √head_dim, of the scores. Without channels, every score is 0 at any scale."""
    return max(head_dim, 1) ** -0.5


def make_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    queries: int,
    keys: int,
    heads: int = 2,
    head_dim: int = 16,
    masked: bool = False,
    causal: bool = False,
    fused: bool = False,
) -> Arguments:
    """With `fused`, keys and values are views of one projection. Padding holds NaN."""
    query = normal(generator, batch, queries, heads, head_dim)
    if fused:
        key, value = normal(generator, batch, keys, 2, heads, head_dim).unbind(2)
    else:
        key, value = (normal(generator, batch, keys, heads, head_dim) for _ in range(2))
    mask = None
    if masked:
        mask = padding_mask(batch, keys)
        for tensor in (key, value):
            tensor.masked_fill_(~mask[:, :, None, None].bool(), torch.nan)
    return Arguments(query, key, value, mask, causal)


def padding_mask(batch: int, keys: int) -> Tensor:
    """Row i masks its last i keys. The last row, if there are several, also masks its second key."""
    mask = torch.arange(keys) < keys - torch.arange(batch)[:, None] % max(keys, 1)
    if batch > 1 and keys > 2:
        mask[-1, 1] = False
    return mask.long()


def without_padding(key: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values with zeros for padding, which may hold anything, NaN included."""
    if key_padding_mask is None:
        return key, value
    padding = ~key_padding_mask[:, :, None, None].bool()
    return key.masked_fill(padding, 0), value.masked_fill(padding, 0)


def _visible(query: Tensor, key: Tensor, key_padding_mask: Tensor | None, causal: bool) -> Tensor | None:
    """Which keys each query sees, `(batch or 1, 1, queries or 1, keys)`; None for all."""
    mask = None if key_padding_mask is None else key_padding_mask[:, None, None, :].bool()
    if causal:
        triangle = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device).tril()
        mask = triangle[None, None] if mask is None else mask & triangle
    return mask


def attention_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    causal: bool,
    dropout_p: float = 0.0,
    attend: Attend = attend,
) -> Tensor:
    mask = None if key_padding_mask is None else _visible(query, key, key_padding_mask, causal)
    key, value = without_padding(key, value, key_padding_mask)
    heads_first = (t.transpose(1, 2) for t in (query, key, value))
    out = attend(*heads_first, mask, dropout_p, causal and mask is None)
    if mask is not None:
        out = out.masked_fill(~mask.any(dim=-1, keepdim=True), 0)
    return out.transpose(1, 2).flatten(2).contiguous()


def attention_cpu(query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, causal: bool) -> Tensor:
    """All `(batch, tokens, heads, head_dim)`. The last axis is dense, other strides are arbitrary."""
    batch, queries, heads, head_dim = query.shape
    out = query.new_empty(batch, queries, heads * head_dim)
    if out.numel() == 0:
        return out
    mask = None if key_padding_mask is None else key_padding_mask.bool().contiguous()
    cpu.module().attention(
        cpu.isa(),
        query.dtype == torch.bfloat16,
        cpu.threads(query.numel() * key.shape[1] // 8),
        (batch, queries, key.shape[1], heads, head_dim),
        query.data_ptr(),
        query.stride()[:3],
        key.data_ptr(),
        key.stride()[:3],
        value.data_ptr(),
        value.stride()[:3],
        cpu.address(mask),
        key.shape[1],
        head_dim**-0.5,
        causal,
        out.data_ptr(),
    )
    return out


def cpu_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    reasons = cpu.reasons(query, key=key, value=value)
    if query.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"the native kernel supports heads of up to {MAX_HEAD_DIM} channels, got {query.shape[-1]}")
    return reasons


def attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    causal: bool,
    buffers: Sequence[Tensor] = (),
) -> Tensor:
    """`buffers`: the tensor for log2 Σ exp, in training."""
    out = query.new_empty(query.shape[0], query.shape[1], query.shape[2] * query.shape[3])
    query, key, value = map(side_by_side, (query, key, value))
    short = triton.kernels("attention_short")
    if key_padding_mask is None and not causal and short.serves(query, key):
        short.forward(query, key, value, out, *buffers)
    else:
        triton.kernels("attention").forward(query, key, value, as_bytes(key_padding_mask), causal, out, *buffers)
    return out


def attention_backward_triton(
    grads: list[Tensor | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    causal: bool,
    saved: list[Tensor],
    needs: list[bool],
    tokens_first: Callable[[Tensor], Tensor] = lambda memory: memory,
) -> list[Tensor]:
    """The needed gradients of query, key and value.

    Args:
        saved: the result, and the buffer that `attention_triton` filled.
        tokens_first: views keys and values as `(batch, tokens, heads, head_dim)`.
    """
    made = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    out, logsum = saved
    grad = torch.zeros_like(out) if grads[0] is None else grads[0].contiguous()
    query, key, value = map(side_by_side, (query, tokens_first(key), tokens_first(value)))
    dkey, dvalue = map(tokens_first, made[1:]) if any(needs[1:]) else (None, None)
    triton.kernels("attention").backward(
        query, key, value, as_bytes(key_padding_mask), causal, out, logsum, grad, made[0], dkey, dvalue
    )
    return [gradient for gradient, need in zip(made, needs, strict=True) if need]


def logsum_buffer(query: Tensor) -> list[Tensor]:
    batch, q_len, heads, _ = query.shape
    return [query.new_empty(batch, heads, q_len, dtype=torch.float32)]


def side_by_side(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy if its last axis is not dense."""
    return tensor if cpu.dense(tensor) else tensor.contiguous()


def as_bytes(key_padding_mask: Tensor | None) -> Tensor | None:
    """Zero for padding."""
    return None if key_padding_mask is None else key_padding_mask.bool().view(torch.uint8)


def triton_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    reasons = triton.reasons(query, key=key, value=value)
    if query.shape[-1] > MAX_TRITON_HEAD_DIM:
        reasons.append(
            f"the Triton kernels support heads of up to {MAX_TRITON_HEAD_DIM} channels, got {query.shape[-1]}"
        )
    return reasons


def check_attention(query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, causal: bool) -> None:
    q_shape, k_shape = query.shape, key.shape
    if len(q_shape) != 4 or len(k_shape) != 4 or k_shape != value.shape:
        raise ValueError(
            "query must be (batch, q_len, heads, head_dim), key and value (batch, k_len, heads, head_dim), got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if q_shape[0] != k_shape[0] or q_shape[2:] != k_shape[2:]:
        raise ValueError(
            f"query and key must agree in batch, heads and head_dim, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if key_padding_mask is not None and key_padding_mask.shape != k_shape[:2]:
        raise ValueError(f"key_padding_mask must be {tuple(key.shape[:2])}, got {tuple(key_padding_mask.shape)}")
    if causal and q_shape[1] != k_shape[1]:
        raise ValueError(f"causal attention needs as many queries as keys, got {query.shape[1]} and {key.shape[1]}")


def products(query: Tensor, k_len: int) -> list[Product]:
    """queries·keys, which the backward recomputes, and weights·values."""
    scores = query.numel() * k_len
    of_scores = (2 * scores, ["query"], ["key"], ["query", "key", "value"])
    return [of_scores, (2 * scores, ["query", "key"], ["value"])]


SPEC = Spec(
    name="attention",
    arguments=Arguments,
    results=("(batch, q_len, heads·head_dim)",),
    eager=lambda a: attention_reference(*a),
    make_inputs=make_inputs,
    edge_cases=(
        *(
            {"batch": 3, "queries": queries, "keys": keys, "masked": masked, "fused": masked}
            for queries, keys in ((1, 1), (7, 7), (5, 33), (33, 5), (2, 600))
            for masked in (False, True)
        ),
        {"batch": 3, "queries": 17, "keys": 257, "masked": True, "fused": True},
        *(
            {"batch": 2, "queries": length, "keys": length, "masked": masked, "causal": True}
            for length in (1, 2, 9, 70)
            for masked in (False, True)
        ),
        {"batch": 2, "queries": 9, "keys": 31, "heads": 3, "head_dim": 33},
        {"batch": 1, "queries": 65, "keys": 129, "heads": 1, "head_dim": 128, "fused": True},
        *(
            {"batch": 1, "queries": queries, "keys": keys, "head_dim": 64, "fused": True}
            for queries, keys in ((64, 96), (80, 128), (129, 257), (131, 272), (145, 197))
        ),
        {"batch": 1, "queries": 3, "keys": 20, "heads": 2, "head_dim": 5},
        {"batch": 0, "queries": 3, "keys": 5},
        {"batch": 2, "queries": 3, "keys": 5, "head_dim": 0},
    ),
    models={
        "base": {"batch": 16, "queries": 197, "keys": 197, "heads": 12, "head_dim": 64, "fused": True},
        "large": {"batch": 16, "queries": 257, "keys": 257, "heads": 16, "head_dim": 64, "fused": True},
        "large, universal": {"batch": 1, "queries": 4097, "keys": 4097, "heads": 16, "head_dim": 64, "fused": True},
    },
    count_flops=lambda a: (2 if a.causal else 4) * a.query.numel() * a.key.shape[1],
    matrix_products=lambda a: products(a.query, a.key.shape[1]),
    differentiable=("query", "key", "value"),
)

OP: Op[Tensor] = Op(
    SPEC,
    [
        Backend("cpu", lambda a: attention_cpu(*a), lambda a: cpu_reasons(*a[:3]), devices=("cpu",)),
        Backend(
            "triton",
            lambda a: attention_triton(*a),
            lambda a: triton_reasons(*a[:3]),
            devices=triton.DEVICES,
            backward=lambda grads, a, saved, needs: attention_backward_triton(grads, *a, saved, needs),
            buffers=lambda a: logsum_buffer(a.query),
            train=lambda a, buffers: attention_triton(*a, buffers),
        ),
        Backend(
            "flash_attn",
            lambda a: attention_packages.flash_attn(*a),
            lambda a: attention_packages.flash_attn_reasons(*a),
            devices=("cuda",),
            differentiable=True,
        ),
        Backend(
            "xformers",
            lambda a: attention_packages.xformers(*a),
            lambda a: attention_packages.xformers_reasons(*a),
            devices=("cuda",),
            differentiable=True,
        ),
        Backend("torch", lambda a: attention_torch(*a), differentiable=True),
    ],
    fake=lambda a: a.query.new_empty(*a.query.shape[:2], a.query.shape[2] * a.query.shape[3]),
    check=lambda a: check_attention(*a),
    formula=lambda a: attention_torch(*a, attend=attend_any_order),
    autocast=True,
    backward_reads_results=True,
)


@OP.public
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(query·keyᵀ / √head_dim)·value, self or cross.

    Args:
        query: `(batch, q_len, heads, head_dim)`. key, value: `(batch, k_len, heads, head_dim)`. Any strides.
        key_padding_mask: `(batch, k_len)`, nonzero for tokens and zero for padding, which may hold anything. A query
            that sees no key gets zeros.
        causal: query i sees keys up to i; q_len must equal k_len.

    Returns `(batch, q_len, heads·head_dim)`, contiguous.

    Raises:
        ValueError: mismatched shapes.
    """
    return OP(query, key, value, key_padding_mask, causal)


def attention_with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    *,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """`attention` for training, with dropout on the weights. PyTorch computes it, because a backward that recomputes
    the forward would drop other weights.

    Args:
        dropout_p: from 0, which is `attention` itself, to 1.
    """
    if dropout_p == 0:
        return attention(query, key, value, key_padding_mask=key_padding_mask, causal=causal)
    check_attention(query, key, value, key_padding_mask, causal)
    return attention_torch(query, key, value, key_padding_mask, causal, dropout_p)

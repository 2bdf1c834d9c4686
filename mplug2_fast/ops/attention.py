"""Multi-head attention of whole sequences, self or cross."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mplug2_fast.ops.runtime import attention_packages, cpu, triton
from mplug2_fast.ops.runtime.dispatch import Backend, Op
from mplug2_fast.ops.runtime.spec import Product, Spec, normal
from mplug2_fast.ops.runtime.spec import upcast as in_float64
from mplug2_fast.ops.scaled_dot_product import Attend, attend, attend_any_order

MAX_HEAD_DIM = 256
"""Of the native kernel."""
MAX_TRITON_HEAD_DIM = 128
"""Of the Triton kernels: 256 channels would leave no room for tiles."""


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    causal: bool,
    *,
    upcast: bool = False,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """softmax(query·keyᵀ / √head_dim)·value with the whole matrix of scores; `dropout` is applied to the softmax."""
    if upcast:
        query, key, value = in_float64(query, key, value)
    mask = _visible(query, key, key_padding_mask, causal)
    key, value = without_padding(key, value, key_padding_mask)
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is None:
        weights = scores.softmax(dim=-1)
    else:  # a query that sees no key gets zeros
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).masked_fill(~mask, 0)
    weights = weights if dropout is None else dropout(weights)
    return (weights @ value).transpose(1, 2).flatten(2)


def make(
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
) -> dict[str, Any]:
    """`fused` makes keys and values views of one projection. Padding holds NaN."""
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
    return {"query": query, "key": key, "value": value, "key_padding_mask": mask, "causal": causal}


def padding_mask(batch: int, keys: int) -> Tensor:
    """Row i lacks its last i keys; the last row of several also its second one."""
    mask = torch.arange(keys) < keys - torch.arange(batch)[:, None] % max(keys, 1)
    if batch > 1 and keys > 2:
        mask[-1, 1] = False
    return mask.long()


def without_padding(key: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values with zeros for padding, so that whatever it holds, NaN included, goes nowhere."""
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


def attention_any_order(*arguments: Any) -> Tensor:
    """`attention_torch` by operators that can be differentiated to any order and in any mode."""
    return attention_torch(*arguments, attend=attend_any_order)


def attention_native(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, causal: bool = False
) -> Tensor:
    """All of shape `(batch, tokens, heads, head_dim)`, any strides but the last."""
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


def native_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    reasons = cpu.reasons(query, key=key, value=value)
    if query.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"the native kernel is for heads of up to {MAX_HEAD_DIM} channels, not {query.shape[-1]}")
    return reasons


def attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    causal: bool,
    saved: Sequence[Tensor] = (),
) -> Tensor:
    """`saved`: where training leaves log2 Σ exp."""
    out = query.new_empty(query.shape[0], query.shape[1], query.shape[2] * query.shape[3])
    query, key, value = map(side_by_side, (query, key, value))
    short = triton.kernels("attention_short")
    if key_padding_mask is None and not causal and short.serves(query, key):
        short.forward(query, key, value, out, *saved)
    else:
        triton.kernels("attention").forward(query, key, value, as_bytes(key_padding_mask), causal, out, *saved)
    return out


def attention_backward_triton(
    grads: list[Tensor | None],
    arguments: tuple[Tensor, Tensor, Tensor, Tensor | None],
    causal: bool,
    saved: list[Tensor],
    needs: list[bool],
    tokens_first: Callable[[Tensor], Tensor] = lambda memory: memory,
) -> list[Tensor]:
    """From the gradient of the result to those that are needed of query, key and value.

    Args:
        saved: the result, and what `attention_triton` left.
        tokens_first: views keys and values as `(batch, tokens, heads, head_dim)`.
    """
    query, key, value, key_padding_mask = arguments
    made = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    out, logsum = saved
    grad = torch.zeros_like(out) if grads[0] is None else grads[0].contiguous()
    query, key, value = map(side_by_side, (query, tokens_first(key), tokens_first(value)))
    dkey, dvalue = map(tokens_first, made[1:]) if any(needs[1:]) else (None, None)
    triton.kernels("attention").backward(
        query, key, value, as_bytes(key_padding_mask), causal, out, logsum, grad, made[0], dkey, dvalue
    )
    return [gradient for gradient, need in zip(made, needs, strict=True) if need]


def saved_triton(query: Tensor, *_: Any) -> list[Tensor]:
    batch, q_len, heads, _ = query.shape
    return [query.new_empty(batch, heads, q_len, dtype=torch.float32)]


def side_by_side(tensor: Tensor) -> Tensor:
    """The tensor, its last axis copied together where it is not dense."""
    return tensor if cpu.dense(tensor) else tensor.contiguous()


def as_bytes(key_padding_mask: Tensor | None) -> Tensor | None:
    """Zero for padding."""
    return None if key_padding_mask is None else key_padding_mask.bool().view(torch.uint8)


def triton_reasons(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> list[str]:
    reasons = triton.reasons(query, key=key, value=value)
    if query.shape[-1] > MAX_TRITON_HEAD_DIM:
        reasons.append(
            f"the Triton kernels are for heads of up to {MAX_TRITON_HEAD_DIM} channels, not {query.shape[-1]}"
        )
    return reasons


def check(query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, causal: bool) -> None:
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        raise ValueError(
            "query must be (batch, q_len, heads, head_dim), key and value (batch, k_len, heads, head_dim), got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if (query.shape[0], *query.shape[2:]) != (key.shape[0], *key.shape[2:]):
        raise ValueError(
            f"query and key must agree in batch, heads and head_dim, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if key_padding_mask is not None and key_padding_mask.shape != key.shape[:2]:
        raise ValueError(f"key_padding_mask must be {tuple(key.shape[:2])}, got {tuple(key_padding_mask.shape)}")
    if causal and query.shape[1] != key.shape[1]:
        raise ValueError(f"causal attention needs as many queries as keys, got {query.shape[1]} and {key.shape[1]}")


def flops(query: Tensor, key: Tensor, causal: bool = False, **_: Any) -> int:
    scores = query.numel() * key.shape[1]
    return 2 * scores if causal else 4 * scores


def products(scores: int) -> list[Product]:
    """Those of queries and keys, which the backward computes again, and of weights and values."""
    of_scores = (2 * scores, ["query"], ["key"], ["query", "key", "value"])
    return [of_scores, (2 * scores, ["query", "key"], ["value"])]


SPEC = Spec(
    name="attention",
    axes={
        "query": "(batch, q_len, heads, head_dim)",
        "key": "(batch, k_len, heads, head_dim)",
        "value": "(batch, k_len, heads, head_dim)",
        "key_padding_mask": "(batch, k_len)",
        "result": "(batch, q_len, heads·head_dim)",
    },
    reference=attention_reference,
    make=make,
    awkward=(
        *(
            {"batch": 3, "queries": queries, "keys": keys, "masked": masked, "fused": masked}
            for queries, keys in ((1, 1), (7, 7), (5, 33), (33, 5), (17, 257), (2, 600))
            for masked in (False, True)
        ),
        *(
            {"batch": 2, "queries": length, "keys": length, "masked": masked, "causal": True}
            for length in (1, 2, 9, 70)
            for masked in (False, True)
        ),
        {"batch": 2, "queries": 9, "keys": 31, "heads": 3, "head_dim": 33},
        {"batch": 1, "queries": 65, "keys": 129, "heads": 1, "head_dim": 128, "fused": True},
        *(
            {"batch": 2, "queries": queries, "keys": keys, "head_dim": 64, "fused": True}
            for queries, keys in ((64, 96), (80, 128), (129, 257), (131, 272), (145, 197))
        ),
        {"batch": 1, "queries": 3, "keys": 20, "heads": 2, "head_dim": 5},
        {"batch": 0, "queries": 3, "keys": 5},
    ),
    models={
        "base": {"batch": 16, "queries": 197, "keys": 197, "heads": 12, "head_dim": 64, "fused": True},
        "large": {"batch": 16, "queries": 257, "keys": 257, "heads": 16, "head_dim": 64, "fused": True},
        "large, universal": {"batch": 1, "queries": 4097, "keys": 4097, "heads": 16, "head_dim": 64, "fused": True},
    },
    flops=flops,
    products=lambda query, key, **_: products(query.numel() * key.shape[1]),
    differentiable=("query", "key", "value"),
)

OP = Op(
    SPEC,
    "(Tensor query, Tensor key, Tensor value, Tensor? key_padding_mask, bool causal) -> Tensor",
    [
        Backend(
            "cpu", attention_native, lambda query, key, value, *_: native_reasons(query, key, value), devices=("cpu",)
        ),
        Backend(
            "triton",
            attention_triton,
            triton_reasons,
            devices=triton.DEVICES,
            backward=lambda grads, arguments, saved, needs: attention_backward_triton(
                grads, arguments[:4], arguments[4], saved, needs
            ),
            saved=saved_triton,
            train=attention_triton,
        ),
        Backend(
            "flash_attn",
            attention_packages.flash_attn,
            attention_packages.flash_attn_reasons,
            devices=("cuda",),
            differentiable=True,
        ),
        Backend(
            "xformers",
            attention_packages.xformers,
            attention_packages.xformers_reasons,
            devices=("cuda",),
            differentiable=True,
        ),
        Backend("torch", attention_torch, differentiable=True),
    ],
    fake=lambda query, *_: query.new_empty(query.shape[0], query.shape[1], query.shape[2] * query.shape[3]),
    check=check,
    formula=attention_any_order,
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
        key_padding_mask: `(batch, k_len)`, nonzero for tokens, zero for padding, whose keys and values may hold
            anything. A query that sees no key gets zeros.
        causal: query i sees keys up to i; q_len must equal k_len.

    Returns `(batch, q_len, heads·head_dim)`, contiguous.

    Raises:
        ValueError: shapes that do not go together.
    """
    return query, key, value, key_padding_mask, causal  # type: ignore[return-value]


def attention_with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    *,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """`attention` for training with dropout on the weights, which is PyTorch's: a backward that computes the forward
    again would draw other weights to drop.

    Args:
        dropout_p: from 0, which is `attention` itself, to 1.
    """
    if dropout_p == 0:
        return attention(query, key, value, key_padding_mask=key_padding_mask, causal=causal)
    check(query, key, value, key_padding_mask, causal)
    return attention_torch(query, key, value, key_padding_mask, causal, dropout_p)

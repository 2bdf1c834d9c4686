"""Attention of the beams of a video to the one memory that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops.attention import (
    as_bytes,
    attention_any_order,
    attention_backward_triton,
    attention_native,
    attention_reference,
    attention_torch,
    native_reasons,
    products,
    saved_triton,
    side_by_side,
    triton_reasons,
)
from mplug2_fast.ops.attention import check as check_attention
from mplug2_fast.ops.attention import make as make_attention
from mplug2_fast.ops.runtime import triton
from mplug2_fast.ops.runtime.dispatch import Backend, Op
from mplug2_fast.ops.runtime.spec import Spec


def reference(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, *, upcast: bool = False
) -> Tensor:
    """As `attention`, with the heads before the tokens in the memory."""
    return attention_reference(
        query, key.transpose(1, 2), value.transpose(1, 2), key_padding_mask, causal=False, upcast=upcast
    )


def make(generator: torch.Generator, **sizes: Any) -> dict[str, Any]:
    made = make_attention(generator, **sizes)
    key, value = (made[name].transpose(1, 2).contiguous() for name in ("key", "value"))
    return {"query": made["query"], "key": key, "value": value, "key_padding_mask": made["key_padding_mask"]}


def run_torch(query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    if key_padding_mask is not None or query.device.type != "cpu" or query.shape[1] > 16:
        return attention_torch(query, key.transpose(1, 2), value.transpose(1, 2), key_padding_mask, causal=False)
    # A handful of queries: two products that read the memory once beat the blocked kernel three times over.
    scores = (query.transpose(1, 2) * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    out = F.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype) @ value
    return out.transpose(1, 2).flatten(2).contiguous()


def run_native(query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    return attention_native(query, key.transpose(1, 2), value.transpose(1, 2), key_padding_mask)


def run_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    saved: Sequence[Tensor] = (),
) -> Tensor:
    """`saved`: where training leaves log2 Σ exp."""
    out = query.new_empty(query.shape[0], query.shape[1], query.shape[2] * query.shape[3])
    query, key, value = map(side_by_side, (query, key.transpose(1, 2), value.transpose(1, 2)))
    triton.kernels("beam_attention").forward(query, key, value, as_bytes(key_padding_mask), out, *saved)
    return out


def check(query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> None:
    if key.dim() != 4 or value.dim() != 4:
        raise ValueError(
            f"key and value must be (batch, heads, k_len, head_dim), got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    check_attention(query, key.transpose(1, 2), value.transpose(1, 2), key_padding_mask, causal=False)


SPEC = Spec(
    name="beam_attention",
    axes={
        "query": "(batch, queries, heads, head_dim)",
        "key": "(batch, heads, k_len, head_dim)",
        "value": "(batch, heads, k_len, head_dim)",
        "key_padding_mask": "(batch, k_len)",
        "result": "(batch, queries, heads·head_dim)",
    },
    reference=reference,
    make=make,
    awkward=(
        *(
            {"batch": 3, "queries": queries, "keys": 65, "masked": masked}
            for queries in (1, 5, 16, 17, 40)
            for masked in (False, True)
        ),
        {"batch": 1, "queries": 5, "keys": 1100, "heads": 1, "head_dim": 64},
        {"batch": 2, "queries": 10, "keys": 1, "heads": 3, "head_dim": 33},
        {"batch": 2, "queries": 11, "keys": 200, "heads": 1, "head_dim": 80, "masked": True},
        {"batch": 0, "queries": 3, "keys": 5},
    ),
    models={
        "base": {"batch": 1, "queries": 5, "keys": 3137, "heads": 12, "head_dim": 64},
        "large": {"batch": 1, "queries": 5, "keys": 4097, "heads": 16, "head_dim": 64},
    },
    flops=lambda query, key, **_: 4 * query.numel() * key.shape[2],
    products=lambda query, key, **_: products(query.numel() * key.shape[2]),
    differentiable=("query", "key", "value"),
)

OP = Op(
    SPEC,
    "(Tensor query, Tensor key, Tensor value, Tensor? key_padding_mask) -> Tensor",
    [
        Backend("cpu", run_native, lambda query, key, value, _: native_reasons(query, key, value), devices=("cpu",)),
        Backend(
            "triton",
            run_triton,
            triton_reasons,
            devices=triton.DEVICES,
            backward=lambda grads, arguments, saved, needs: attention_backward_triton(
                grads, arguments, False, saved, needs, tokens_first=lambda memory: memory.transpose(1, 2)
            ),
            saved=saved_triton,
            train=run_triton,
        ),
        Backend("torch", run_torch, differentiable=True),
    ],
    fake=lambda query, *_: query.new_empty(query.shape[0], query.shape[1], query.shape[2] * query.shape[3]),
    check=check,
    formula=lambda query, key, value, mask: attention_any_order(
        query, key.transpose(1, 2), value.transpose(1, 2), mask, False
    ),
    autocast=True,
    backward_reads_results=True,
)


@OP.public
def beam_attention(query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
    """softmax(query·keyᵀ / √head_dim)·value for the queries of all beams of a video, which read its memory once.

    Args:
        query: `(batch, queries, heads, head_dim)`, the queries of all beams of a video side by side.
        key, value: `(batch, heads, k_len, head_dim)`.
        key_padding_mask: `(batch, k_len)`, nonzero for tokens, zero for padding, whose keys and values may hold
            anything. A query that sees no key gets zeros.

    Returns `(batch, queries, heads·head_dim)`, contiguous.

    Raises:
        ValueError: shapes that do not go together.
    """
    return query, key, value, key_padding_mask  # type: ignore[return-value]

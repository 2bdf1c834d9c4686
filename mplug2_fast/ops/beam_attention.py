"""Attention from the beams of a video to the memory that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops.attention import SPEC as ATTENTION
from mplug2_fast.ops.attention import (
    as_bytes,
    attention_backward_triton,
    attention_cpu,
    attention_reference,
    attention_torch,
    check_attention,
    cpu_reasons,
    logsum_buffer,
    products,
    scale_of,
    side_by_side,
    triton_reasons,
)
from mplug2_fast.ops.runtime import triton
from mplug2_fast.ops.runtime.backend import Backend
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.spec import Spec
from mplug2_fast.ops.scaled_dot_product import attend_any_order


class Arguments(NamedTuple):
    query: Annotated[Tensor, "(batch, queries, heads, head_dim)"]
    key: Annotated[Tensor, "(batch, heads, k_len, head_dim)"]
    value: Annotated[Tensor, "(batch, heads, k_len, head_dim)"]
    key_padding_mask: Annotated[Tensor | None, "(batch, k_len)"]

    @property
    def tokens_first(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool]:
        """The arguments of `attention`."""
        return self.query, self.key.transpose(1, 2), self.value.transpose(1, 2), self.key_padding_mask, False


def make_inputs(generator: torch.Generator, **sizes: Any) -> Arguments:
    a = ATTENTION.make_inputs(generator, **sizes)
    return Arguments(a.query, *(t.transpose(1, 2).contiguous() for t in (a.key, a.value)), a.key_padding_mask)


def check(a: Arguments) -> None:
    if a.key.dim() != 4 or a.value.dim() != 4:
        raise ValueError(
            f"key and value must be (batch, heads, k_len, head_dim), got {tuple(a.key.shape)} and "
            f"{tuple(a.value.shape)}"
        )
    check_attention(*a.tokens_first)


def run_torch(a: Arguments) -> Tensor:
    query, key, value, key_padding_mask = a
    if key_padding_mask is not None or query.device.type != "cpu" or query.shape[1] > 16:
        return attention_torch(*a.tokens_first)
    # For a few queries, two products that read the memory once are 3 times as fast as the blocked kernel.
    scores = (query.transpose(1, 2) * scale_of(query.shape[-1])) @ key.transpose(-1, -2)
    out = F.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype) @ value
    return out.transpose(1, 2).flatten(2).contiguous()


def run_triton(a: Arguments, buffers: Sequence[Tensor] = ()) -> Tensor:
    """`buffers`: the tensor for log2 Σ exp, in training."""
    query, key, value, key_padding_mask, _ = a.tokens_first
    out = query.new_empty(query.shape[0], query.shape[1], query.shape[2] * query.shape[3])
    query, key, value = map(side_by_side, (query, key, value))
    triton.kernels("beam_attention").forward(query, key, value, as_bytes(key_padding_mask), out, *buffers)
    return out


SPEC = Spec(
    name="beam_attention",
    arguments=Arguments,
    results=("(batch, queries, heads·head_dim)",),
    eager=lambda a: attention_reference(*a.tokens_first),
    make_inputs=make_inputs,
    edge_cases=(
        *(
            {"batch": 3, "queries": queries, "keys": 65, "masked": masked}
            for queries, masked in ((1, False), (1, True), (5, False), (16, True), (17, False), (40, True))
        ),
        {"batch": 1, "queries": 5, "keys": 1100, "heads": 1, "head_dim": 64},
        {"batch": 2, "queries": 10, "keys": 1, "heads": 3, "head_dim": 33},
        {"batch": 2, "queries": 11, "keys": 200, "heads": 1, "head_dim": 80, "masked": True},
        {"batch": 0, "queries": 3, "keys": 5},
        {"batch": 2, "queries": 3, "keys": 5, "head_dim": 0},
    ),
    models={
        "base": {"batch": 1, "queries": 5, "keys": 3137, "heads": 12, "head_dim": 64},
        "large": {"batch": 1, "queries": 5, "keys": 4097, "heads": 16, "head_dim": 64},
    },
    count_flops=lambda a: 4 * a.query.numel() * a.key.shape[2],
    matrix_products=lambda a: products(a.query, a.key.shape[2]),
    differentiable=("query", "key", "value"),
)

OP: Op[Tensor] = Op(
    SPEC,
    [
        Backend("cpu", lambda a: attention_cpu(*a.tokens_first), lambda a: cpu_reasons(*a[:3]), devices=("cpu",)),
        Backend(
            "triton",
            run_triton,
            lambda a: triton_reasons(*a[:3]),
            devices=triton.DEVICES,
            backward=lambda grads, a, saved, needs: attention_backward_triton(
                grads, *a, False, saved, needs, tokens_first=lambda memory: memory.transpose(1, 2)
            ),
            buffers=lambda a: logsum_buffer(a.query),
            train=run_triton,
        ),
        Backend("torch", run_torch, differentiable=True),
    ],
    fake=lambda a: a.query.new_empty(*a.query.shape[:2], a.query.shape[2] * a.query.shape[3]),
    check=check,
    formula=lambda a: attention_torch(*a.tokens_first, attend=attend_any_order),
    autocast=True,
    backward_reads_results=True,
)


@OP.public
def beam_attention(query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
    """softmax(query·keyᵀ / √head_dim)·value for the queries of all beams of a video, which read its memory once.

    Args:
        query: `(batch, queries, heads, head_dim)`, the queries of all beams of a video.
        key, value: `(batch, heads, k_len, head_dim)`.
        key_padding_mask: `(batch, k_len)`, nonzero for tokens and zero for padding, which may hold anything. A query
            that sees no key gets zeros.

    Returns `(batch, queries, heads·head_dim)`, contiguous.

    Raises:
        ValueError: mismatched shapes.
    """
    return OP(query, key, value, key_padding_mask)

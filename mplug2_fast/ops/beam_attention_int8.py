"""Attention from the beams of a video to the memory that they share, whose keys and values are 8-bit numbers."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from mplug2_fast.ops.attention import MAX_HEAD_DIM, attention_reference, scale_of
from mplug2_fast.ops.beam_attention import SPEC as BEAM_ATTENTION
from mplug2_fast.ops.linear_int8 import quantise_rows
from mplug2_fast.ops.quantise_memory import BLOCK, unpack
from mplug2_fast.ops.quantise_memory import SPEC as QUANTISE_MEMORY
from mplug2_fast.ops.runtime import cpu
from mplug2_fast.ops.runtime.backend import Backend
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.spec import Spec


class Arguments(NamedTuple):
    query: Annotated[Tensor, "(batch, queries, heads, head_dim)"]
    key: Annotated[Tensor, "(batch, heads, blocks, words, 16, 4), int8"]
    key_scale: Annotated[Tensor, "(batch, heads, k_len), float32"]
    value: Annotated[Tensor, "(batch, heads, blocks, 4, head_dim, 4), int8"]
    value_scale: Annotated[Tensor, "(batch, heads, k_len), float32"]
    key_padding_mask: Annotated[Tensor | None, "(batch, k_len)"]

    @property
    def memory(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.key, self.key_scale, self.value, self.value_scale


def make_inputs(generator: torch.Generator, **sizes: Any) -> Arguments:
    a = BEAM_ATTENTION.make_inputs(generator, **sizes)
    memory = QUANTISE_MEMORY.reference(a.key.transpose(1, 2), a.value.transpose(1, 2))
    return Arguments(a.query, *memory, a.key_padding_mask)


def check(a: Arguments) -> None:
    if a.query.dim() != 4:
        raise ValueError(f"query must be (batch, queries, heads, head_dim), got {tuple(a.query.shape)}")
    batch, _, heads, head_dim = a.query.shape
    check_memory(a.memory, (batch, heads, head_dim))
    mask = a.key_padding_mask
    if mask is not None and mask.shape != (expected := (batch, a.key_scale.shape[2])):
        raise ValueError(f"key_padding_mask must be {expected}, got {tuple(mask.shape)}")


def check_memory(memory: tuple[Tensor, Tensor, Tensor, Tensor], sizes: tuple[int, int, int]) -> None:
    """`sizes`: batch, heads and head_dim."""
    (batch, heads, head_dim), (key, key_scale, value, value_scale) = sizes, memory
    if key.dtype != torch.int8 or value.dtype != torch.int8:
        raise TypeError(f"key and value must be int8, got {key.dtype} and {value.dtype}")
    if key_scale.dtype != torch.float32 or value_scale.dtype != torch.float32:
        raise TypeError(f"scales must be float32, got {key_scale.dtype} and {value_scale.dtype}")
    if key_scale.dim() != 3 or key_scale.shape[:2] != (batch, heads) or value_scale.shape != key_scale.shape:
        raise ValueError(
            f"key_scale and value_scale must be ({batch}, {heads}, k_len), got {tuple(key_scale.shape)} and "
            f"{tuple(value_scale.shape)}"
        )
    blocks = -(-key_scale.shape[2] // BLOCK)
    for name, tensor, expected in (
        ("key", key, (batch, heads, blocks, -(-head_dim // 4), BLOCK, 4)),
        ("value", value, (batch, heads, blocks, BLOCK // 4, head_dim, 4)),
    ):
        if tensor.shape != expected:
            raise ValueError(f"{name} must be {expected}, got {tuple(tensor.shape)}: see quantise_memory")


def run_torch(a: Arguments) -> Tensor:
    """In float32 at least, with the query rounded to 16 bits."""
    numbers, scale = quantise_rows(a.query, 16)
    query = numbers * scale
    key, value = (states.to(query.dtype).transpose(1, 2) for states in unpack(*a.memory))
    return attention_reference(query, key, value, a.key_padding_mask, False).to(a.query.dtype).contiguous()


def run_cpu(a: Arguments) -> Tensor:
    query = a.query
    batch, queries, heads, head_dim = query.shape
    out = query.new_empty(batch, queries, heads * head_dim)
    if out.numel() == 0:
        return out
    key, key_scale, value, value_scale = (tensor.contiguous() for tensor in a.memory)
    mask = None if a.key_padding_mask is None else a.key_padding_mask.bool().contiguous()
    tokens = key_scale.shape[2]
    cpu.module().beam_attention_int8(
        cpu.isa(),
        query.dtype == torch.bfloat16,
        cpu.threads(query.numel() * tokens // 8),
        (batch, queries, tokens, heads, head_dim),
        query.data_ptr(),
        query.stride()[:3],
        key.data_ptr(),
        key_scale.data_ptr(),
        value.data_ptr(),
        value_scale.data_ptr(),
        cpu.address(mask),
        scale_of(head_dim),
        out.data_ptr(),
    )
    return out


def cpu_reasons(a: Arguments) -> list[str]:
    reasons = cpu.reasons(a.query)
    if a.query.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"the native kernel supports heads of up to {MAX_HEAD_DIM} channels, got {a.query.shape[-1]}")
    return reasons


SPEC = Spec(
    name="beam_attention_int8",
    arguments=Arguments,
    results=("(batch, queries, heads·head_dim)",),
    eager=run_torch,
    make_inputs=make_inputs,
    edge_cases=(
        *(
            {"batch": 3, "queries": queries, "keys": 65, "masked": masked}
            for queries, masked in ((1, False), (1, True), (5, False), (7, True), (40, True))
        ),
        {"batch": 1, "queries": 5, "keys": 1100, "heads": 1, "head_dim": 64},
        {"batch": 2, "queries": 10, "keys": 1, "heads": 3, "head_dim": 33},
        {"batch": 2, "queries": 11, "keys": 200, "heads": 1, "head_dim": 80, "masked": True},
        {"batch": 2, "queries": 2, "keys": 33, "heads": 1, "head_dim": 6},
        {"batch": 0, "queries": 3, "keys": 5},
        {"batch": 2, "queries": 3, "keys": 0},
        {"batch": 2, "queries": 3, "keys": 5, "head_dim": 0},
    ),
    models=BEAM_ATTENTION.models,
    count_flops=lambda a: 4 * a.query.numel() * a.key_scale.shape[2],
    kept=("key_scale", "value_scale"),
)

OP: Op[Tensor] = Op(
    SPEC,
    [
        Backend("cpu", run_cpu, cpu_reasons, devices=("cpu",)),
        Backend("torch", run_torch),
    ],
    fake=lambda a: a.query.new_empty(*a.query.shape[:2], a.query.shape[2] * a.query.shape[3]),
    check=check,
)


@OP.public
def beam_attention_int8(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor,
    value: Tensor,
    value_scale: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """softmax(query·keyᵀ / √head_dim)·value with keys and values that `quantise_memory` has rounded.

    Each head of a query is rounded to 16 bits. Sums of the products with keys are exact. For bfloat16, the weights of
    values are rounded to 15 bits. There are no gradients.

    Args:
        query: `(batch, queries, heads, head_dim)`, the queries of all beams of a video.
        key, key_scale, value, value_scale: the results of `quantise_memory`.
        key_padding_mask: `(batch, k_len)`, nonzero for tokens and zero for padding, which may hold anything. A query
            that sees no key gets zeros.

    Returns `(batch, queries, heads·head_dim)`, contiguous.

    Raises:
        ValueError: mismatched shapes.
        TypeError: key or value are not int8, or scales not float32.
    """
    return OP(query, key, key_scale, value, value_scale, key_padding_mask)

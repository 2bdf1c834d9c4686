"""Keys and values of a memory in 8 bits, in the order in which `beam_attention_int8` multiplies them."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops.runtime import cpu
from mplug2_fast.ops.runtime.backend import Backend
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.spec import Spec, normal

BLOCK = 16
"""Tokens whose bytes are together."""
ORDER = (0, 2, 1, 3)
"""Of four numbers in memory: so the even bytes are neighbours, and the odd ones. It is its own inverse."""


class Arguments(NamedTuple):
    key: Annotated[Tensor, "(batch, tokens, heads, head_dim)"]
    value: Annotated[Tensor, "(batch, tokens, heads, head_dim)"]


def make_inputs(
    generator: torch.Generator, *, batch: int, tokens: int, heads: int = 2, head_dim: int = 16, fused: bool = False
) -> Arguments:
    """With `fused`, keys and values are views of one projection."""
    if fused:
        return Arguments(*normal(generator, batch, tokens, 2, heads, head_dim).unbind(2))
    return Arguments(*(normal(generator, batch, tokens, heads, head_dim) for _ in range(2)))


def check(a: Arguments) -> None:
    if a.key.dim() != 4 or a.key.shape != a.value.shape or a.key.dtype != a.value.dtype:
        raise ValueError(
            "key and value must be (batch, tokens, heads, head_dim) of one dtype, got "
            f"{tuple(a.key.shape)} in {a.key.dtype} and {tuple(a.value.shape)} in {a.value.dtype}"
        )


def _round(states: Tensor) -> tuple[Tensor, Tensor]:
    """States `(batch, tokens, heads, head_dim)` to bytes `(batch, heads, tokens, head_dim)` and scales."""
    states = states.float().transpose(1, 2)
    size = states.abs().amax(dim=-1, keepdim=True) if states.shape[-1] else states.new_zeros(*states.shape[:-1], 1)
    finite = size.isfinite()
    scale = size / torch.full_like(size, 127)
    usable = finite & (scale >= torch.finfo(torch.float32).tiny)
    factor = scale.reciprocal().where(usable, 0)
    numbers = torch.round((states * factor).where(finite, 0))
    return numbers.to(torch.int8), scale.where(usable, 0).where(finite, torch.nan)[..., 0].contiguous()


def _fours(numbers: Tensor, dim: int, multiple: int) -> Tensor:
    """Fills an axis up with zeros to a multiple, and splits it into fours, whose order becomes that in memory."""
    dim %= numbers.dim()
    missing = -numbers.shape[dim] % multiple
    padding = [0, 0] * (numbers.dim() - dim - 1) + [0, missing]
    numbers = F.pad(numbers, padding)
    numbers = numbers.unflatten(dim, (numbers.shape[dim] // 4, 4))
    return numbers.index_select(dim + 1, torch.tensor(ORDER, device=numbers.device))


def run_torch(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, heads, head_dim = a.key.shape
    blocks, words = -(-tokens // BLOCK), -(-head_dim // 4)
    key, key_scale = _round(a.key)
    key = F.pad(_fours(key, -1, 4), (0, 0, 0, 0, 0, -tokens % BLOCK))
    key = key.view(batch, heads, blocks, BLOCK, words, 4).transpose(3, 4).contiguous()
    value, value_scale = _round(a.value)
    value = _fours(value, -2, BLOCK).transpose(-1, -2)
    value = value.reshape(batch, heads, blocks, BLOCK // 4, head_dim, 4).contiguous()
    return key, key_scale, value, value_scale


def unpack(key: Tensor, key_scale: Tensor, value: Tensor, value_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values `(batch, heads, tokens, head_dim)`, float32, that results of `quantise_memory` stand for."""
    (batch, heads, tokens), head_dim = key_scale.shape, value.shape[4]
    padded, channels, order = key.shape[2] * BLOCK, key.shape[3] * 4, torch.tensor(ORDER, device=key.device)
    key = key.index_select(-1, order).transpose(3, 4).reshape(batch, heads, padded, channels)
    value = value.index_select(-1, order).transpose(-1, -2).reshape(batch, heads, padded, head_dim)
    key, value = (numbers[:, :, :tokens, :head_dim].float() for numbers in (key, value))
    return key * key_scale[..., None], value * value_scale[..., None]


def _empty(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, heads, head_dim = a.key.shape
    blocks, words = -(-tokens // BLOCK), -(-head_dim // 4)
    key = a.key.new_empty(batch, heads, blocks, words, BLOCK, 4, dtype=torch.int8)
    value = a.key.new_empty(batch, heads, blocks, BLOCK // 4, head_dim, 4, dtype=torch.int8)
    key_scale, value_scale = (a.key.new_empty(batch, heads, tokens, dtype=torch.float32) for _ in range(2))
    return key, key_scale, value, value_scale


def run_cpu(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = key, key_scale, value, value_scale = _empty(a)
    batch, tokens, heads, head_dim = a.key.shape
    cpu.module().quantise_memory(
        cpu.isa(),
        a.key.dtype is torch.bfloat16,
        cpu.threads(a.key.numel()),
        (batch, tokens, heads, head_dim),
        a.key.data_ptr(),
        a.key.stride()[:3],
        a.value.data_ptr(),
        a.value.stride()[:3],
        key.data_ptr(),
        key_scale.data_ptr(),
        value.data_ptr(),
        value_scale.data_ptr(),
    )
    return results


SPEC = Spec(
    name="quantise_memory",
    arguments=Arguments,
    results=(
        "(batch, heads, blocks, words, 16, 4), int8",
        "(batch, heads, tokens), float32",
        "(batch, heads, blocks, 4, head_dim, 4), int8",
        "(batch, heads, tokens), float32",
    ),
    eager=run_torch,
    make_inputs=make_inputs,
    edge_cases=(
        {"batch": 1, "tokens": 19, "head_dim": 64, "fused": True},
        {"batch": 2, "tokens": 16, "heads": 3, "head_dim": 20},
        {"batch": 3, "tokens": 1, "heads": 1, "head_dim": 33},
        {"batch": 2, "tokens": 70, "head_dim": 7, "fused": True},
        {"batch": 0, "tokens": 5},
        {"batch": 2, "tokens": 0},
        {"batch": 1, "tokens": 3, "head_dim": 0},
    ),
    models={
        "base": {"batch": 1, "tokens": 3137, "heads": 12, "head_dim": 64, "fused": True},
        "large": {"batch": 1, "tokens": 4097, "heads": 16, "head_dim": 64, "fused": True},
    },
    count_flops=lambda a: 4 * a.key.numel(),
    exact=True,
)

OP: Op[tuple[Tensor, Tensor, Tensor, Tensor]] = Op(
    SPEC,
    [
        Backend("cpu", run_cpu, lambda a: cpu.reasons(a.key, value=a.value), devices=("cpu",)),
        Backend("torch", run_torch),
    ],
    fake=_empty,
    check=check,
)


@OP.public
def quantise_memory(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rounds keys and values to 8 bits, with one scale for each head of a token.

    The scale is the largest absolute number divided by 127. It is NaN if a number of the head is not finite. There are
    no gradients.

    Args:
        key, value: `(batch, tokens, heads, head_dim)`.

    Returns the arguments of `beam_attention_int8`: keys `(batch, heads, blocks, words, 16, 4)`, int8, their scales
    `(batch, heads, tokens)`, float32, values `(batch, heads, blocks, 4, head_dim, 4)`, int8, and their scales. A block
    is 16 tokens, a word four channels. The last four bytes of keys are channels, those of values tokens, in the order
    0, 2, 1, 3.

    Raises:
        ValueError: different shapes or dtypes, or not four axes.
    """
    return OP(key, value)

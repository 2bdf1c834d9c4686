"""PyTorch's own oneDNN linear: an operator with an activation or a residual inside, and weights packed beforehand.

A packed copy serves only a weight that has the copy's checksum.

In float32 it is about twice as fast as `F.linear`, which takes MKL; no gradient passes through it.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mplug2_fast.ops.checksum import checksum, is_readable
from mplug2_fast.ops.runtime import cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ATTRIBUTE = "_mplug2_fast_packed"

MANY_ROWS = 512
MUCH_WORK = 1 << 28
"""Minimum rows, and minimum rows × weight elements, for a packed weight to serve.

Below, its checksum costs as much as packing saves. Measured on two cores of a Zen 3, 1024 to 4096 features in float32:
the checksum of 16 MB takes 0.9 ms, which is 3 to 4% of a product with 512 rows and 0.4% of one with 4,112. A call takes
15 µs beside reading the weight, half a percent of the smallest product."""


@dataclass(frozen=True)
class _Copy:
    """A weight in oneDNN's layout. `made_of` identifies the values it was made of."""

    made_of: tuple[Any, ...]
    tensor: Tensor
    rows: int


class _Copies:
    """The packed copies of a tensor and of parts of it, by place. No two of them overlap."""

    def __init__(self) -> None:
        self.by_place: dict[tuple[Any, ...], _Copy] = {}

    def drop_overlapping(self, place: tuple[Any, ...]) -> None:
        begin, end = place[0], place[0] + math.prod(place[1])
        for other in list(self.by_place):
            if other[0] < end and begin < other[0] + math.prod(other[1]):
                self.by_place.pop(other, None)

    def __reduce__(self) -> Any:  # copies and pickles of the weight are not packed
        return (type(None), ())


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether the processor has instructions for products in this type. Without them oneDNN refuses it or takes, for
    bfloat16 with AVX-512, four times as long as for float32: callers then compute `in_float32`."""
    if dtype == torch.bfloat16:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        return torch.ops.mkldnn._is_mkldnn_bf16_supported() and (not x86 or torch.cpu._is_avx512_bf16_supported())
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def not_supported_reasons(x: Tensor, *parameters: Tensor | None) -> list[str]:
    """Why oneDNN's linear cannot compute with these tensors on this machine."""
    found = []
    if not (_is_available() and torch.backends.mkldnn.enabled):
        found.append("this torch is built without oneDNN, or it is turned off")
    elif x.dtype not in DTYPES:
        found.append(f"oneDNN's linear is for float32, bfloat16 and float16, not {x.dtype}")
    return found + cpu.parameter_reasons(x, parameters)


@functools.cache
def _is_available() -> bool:
    return torch.backends.mkldnn.is_available()


def pack(weight: Tensor, rows: int) -> None:
    """Keeps a packed copy beside a weight, for products with about this many rows.

    Args:
        weight: `(out_features, in_features)`, or with more axes, as of a convolution, whose product is that of
            `weight.flatten(1)`.

    The copy does not show in state dicts. It serves products that are large enough, see `MANY_ROWS`. Each of them
    compares a checksum of the weight with that of the copy, and makes the copy anew where they differ: whoever has
    written to the weight, and how, results are those of the weight as it is.

    A weight is left alone where its memory has gaps or the native module is missing, and where products of its type are
    computed in float32.
    """
    matrix = weight.flatten(1)
    if matrix.data_ptr() != weight.data_ptr() or weight.numel() == 0 or not is_readable(matrix):
        return
    if not not_supported_reasons(matrix) and multiplies(matrix.dtype):
        holder, place = _place(weight, matrix)
        copies = getattr(holder, _ATTRIBUTE, None)
        if copies is None:
            copies = _Copies()
            setattr(holder, _ATTRIBUTE, copies)
        copies.drop_overlapping(place)
        copies.by_place[place] = _packed_copy(matrix, rows, _values(matrix))


def unpack(weight: Tensor) -> None:
    """Drops the packed copy, if there is one."""
    holder, place = _place(weight, weight)
    copies = getattr(holder, _ATTRIBUTE, None)
    if copies is not None:
        copies.drop_overlapping(place)


def is_packed(weight: Tensor) -> bool:
    """Whether a packed copy of a weight is kept, be it of its values as they are or as they were."""
    holder, place = _place(weight, weight.flatten(1))
    copies = getattr(holder, _ATTRIBUTE, None)
    return copies is not None and place in copies.by_place


def packed(weight: Tensor) -> Tensor | None:
    """The packed copy of a weight, or of the one that it is a view of, with its values as they are; None where none is
    kept."""
    matrix = weight.flatten(1)
    holder, place = _place(weight, matrix)
    copies = getattr(holder, _ATTRIBUTE, None)
    copy = None if copies is None else copies.by_place.get(place)
    if copy is None or not multiplies(matrix.dtype) or not is_readable(matrix):
        return None
    values = _values(matrix)
    if copy.made_of != values:
        copy = copies.by_place[place] = _packed_copy(matrix, copy.rows, values)
    return copy.tensor


def _place(weight: Tensor, matrix: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """The tensor that keeps the copies of a weight, and where in it the weight is."""
    holder = weight if weight._base is None else weight._base
    return holder, (matrix.storage_offset() - holder.storage_offset(), matrix.shape, matrix.stride())


def _values(matrix: Tensor) -> tuple[Any, ...]:
    return matrix.dtype, checksum((matrix,))


def _packed_copy(matrix: Tensor, rows: int, values: tuple[Any, ...]) -> _Copy:
    tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.detach().contiguous(), rows)
    return _Copy(values, tensor, rows)


def pays(weight: Tensor, rows: int) -> bool:
    """Whether a packed weight makes a product with this many rows faster, its checksum included."""
    return rows >= MANY_ROWS and rows * weight.numel() >= MUCH_WORK


def for_rows(weight: Tensor, rows: int) -> Tensor:
    """The form of a weight in which `linear` multiplies this many rows: packed if it is kept so and that pays."""
    if weight.is_mkldnn or not pays(weight, rows):
        return weight
    copy = packed(weight)
    return weight if copy is None else copy


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """`activation(x @ weight.T + bias)` with oneDNN's `"none"`, `"swish"` or `"gelu"` (erf), or with "none" and a
    residual their sum. The weight may be one of `for_rows`."""
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    weight = for_rows(weight, x.numel() // x.shape[-1])
    bias = None if bias is None else bias.contiguous()  # oneDNN takes its elements for neighbours
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none" if activation == "gelu" else "")


def in_float32(
    run: Callable[..., Tensor], out: Tensor, rows: Sequence[Tensor | None], others: Sequence[Any], block: int = 512
) -> Tensor:
    """Puts `run(*rows, *others)` into out, computed in float32 with so many of the rows at a time: as many as a product
    needs for its full rate, and few enough to stay in the cache."""
    others = [other.float() if isinstance(other, Tensor) else other for other in others]
    targets = out.split(block)
    blocks = [[None] * len(targets) if each is None else each.split(block) for each in rows]
    for target, *sources in zip(targets, *blocks, strict=True):
        target.copy_(run(*(None if source is None else source.float() for source in sources), *others))
    return out

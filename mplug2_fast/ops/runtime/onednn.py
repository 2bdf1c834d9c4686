"""PyTorch's oneDNN linear layer, with a fused activation or residual, and weights packed in advance.

A packed copy is used only if its checksum is that of the weight. In float32, oneDNN is about twice as fast as
`F.linear`, which uses MKL. It has no gradients.
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
_is_enabled = torch._C._get_mkldnn_enabled  # torch.backends.mkldnn.enabled, in a fifth of its time

ROW_MULTIPLE, PADDED_ROWS = 8, range(513, 1024)
"""With these numbers of rows oneDNN looks for a block size that divides them. A prime number, such as the 577 tokens of
an image of 24 × 24 patches, has none: its products are a third slower than those of 584 rows (float32, AVX2)."""

MANY_ROWS = 512
MUCH_WORK = 1 << 28
"""Minimum rows, and minimum rows × weight elements, for a packed weight to win.

Below, the checksum costs as much as packing saves. Measured on two cores of a Zen 3, with 1024 to 4096 features in
float32: the checksum of 16 MB takes 0.9 ms, 3 to 4% of a product with 512 rows and 0.4% of one with 4,112. A call has
15 µs of overhead, half a percent of the smallest product."""


@dataclass(frozen=True)
class _Copy:
    """A weight in oneDNN's layout. `made_of` identifies the values that it was made from."""

    made_of: tuple[Any, ...]
    tensor: Tensor
    rows: int


class _Copies:
    """The packed copies of a tensor and of parts of it, by place. They do not overlap."""

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
    """Whether the processor has instructions for products in this dtype. Without them oneDNN refuses the dtype, or is
    four times as slow as for float32 (bfloat16 with AVX-512). Callers then compute `in_float32`."""
    if dtype == torch.bfloat16:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        return torch.ops.mkldnn._is_mkldnn_bf16_supported() and (not x86 or torch.cpu._is_avx512_bf16_supported())
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def not_supported_reasons(x: Tensor, *parameters: Tensor | None) -> list[str]:
    """Why oneDNN's linear cannot compute with these tensors on this machine."""
    found = []
    if not (_is_available() and _is_enabled()):
        found.append("this torch was built without oneDNN, or oneDNN is turned off")
    elif x.dtype not in DTYPES:
        found.append(f"oneDNN's linear supports float32, bfloat16 and float16, got {x.dtype}")
    return found + cpu.parameter_reasons(x, parameters)


@functools.cache
def _is_available() -> bool:
    return torch.backends.mkldnn.is_available()


def pack(weight: Tensor, rows: int) -> None:
    """Stores a packed copy with a weight, for products with about this many rows.

    Args:
        weight: `(out_features, in_features)`. A weight with more axes, as of a convolution, multiplies as
            `weight.flatten(1)`.

    State dicts do not contain the copy. Products that are large enough use it, see `MANY_ROWS`. Each of them compares
    the weight's checksum with that of the copy, and renews the copy if they differ. So results always belong to the
    weight's present values, however it was written.

    Does nothing if the weight's memory has gaps, the native module is missing, or products in its dtype are computed in
    float32.
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
    """Drops the packed copy, if any."""
    holder, place = _place(weight, weight)
    copies = getattr(holder, _ATTRIBUTE, None)
    if copies is not None:
        copies.drop_overlapping(place)


def is_packed(weight: Tensor) -> bool:
    """Whether a weight has a packed copy, of its present or of earlier values."""
    holder, place = _place(weight, weight.flatten(1))
    copies = getattr(holder, _ATTRIBUTE, None)
    return copies is not None and place in copies.by_place


def packed(weight: Tensor) -> Tensor | None:
    """The packed copy of a weight, or of the weight that it is a view of, with its present values; None if there is
    none."""
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
    """The tensor that holds the copies of a weight, and the weight's place in it."""
    holder = weight if weight._base is None else weight._base
    return holder, (matrix.storage_offset() - holder.storage_offset(), matrix.shape, matrix.stride())


def _values(matrix: Tensor) -> tuple[Any, ...]:
    return matrix.dtype, checksum((matrix,))


def _packed_copy(matrix: Tensor, rows: int, values: tuple[Any, ...]) -> _Copy:
    tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.detach().contiguous(), rows)
    return _Copy(values, tensor, rows)


def pays(weight: Tensor, rows: int) -> bool:
    """Whether a packed weight makes a product with this many rows faster, including its checksum."""
    return rows >= MANY_ROWS and rows * weight.numel() >= MUCH_WORK


def for_rows(weight: Tensor, rows: int) -> Tensor:
    """The weight as `linear` needs it for this many rows: packed if it has a packed copy and that pays."""
    if weight.is_mkldnn or not pays(weight, rows):
        return weight
    copy = packed(weight)
    return weight if copy is None else copy


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """`activation(x @ weight.T + bias)`, or `residual + x @ weight.T + bias`.

    Args:
        weight: a weight, or the result of `for_rows`.
        activation: oneDNN's `"none"`, `"swish"` or `"gelu"` (erf); "none" with a residual.
    """
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    rows = x.numel() // x.shape[-1]
    if rows % ROW_MULTIPLE and rows in PADDED_ROWS:
        more = -rows % ROW_MULTIPLE
        residual = None if residual is None else _with_more_rows(residual, more)
        out = linear(_with_more_rows(x, more), weight, bias, activation, residual)
        return out[:rows].view(*x.shape[:-1], out.shape[1])
    weight = for_rows(weight, rows)
    bias = None if bias is None else bias.contiguous()  # oneDNN ignores its stride
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
    if activation == "gelu" and x.dtype is torch.float32 and not _is_gelu_fast():
        return torch.ops.aten.gelu_(torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none" if activation == "gelu" else "")


@functools.cache
def _is_gelu_fast() -> bool:
    """Whether oneDNN's GELU is as fast as PyTorch's. With AVX2 it takes twice as long (Zen 3), a tenth of a layer."""
    return torch.backends.cpu.get_cpu_capability() != "AVX2"


def _with_more_rows(x: Tensor, more: int) -> Tensor:
    """x `(..., features)` as rows, with rows of zeros behind it."""
    return torch.cat([x.reshape(-1, x.shape[-1]), x.new_zeros(more, x.shape[-1])])


def in_float32(
    run: Callable[[Any], Tensor], arguments: Any, out: Tensor, by_row: Sequence[str], block: int = 512
) -> Tensor:
    """Writes `run(arguments)` to out, computed in float32 in blocks of rows. A block is large enough for products to
    reach their full rate, and small enough to stay in the cache.

    Args:
        arguments: an operator's NamedTuple.
        by_row: the arguments that are split into blocks; a block of out depends on the same block of each.
    """
    tensors = {name: value for name, value in arguments._asdict().items() if isinstance(value, Tensor)}
    whole = {name: tensor.float() for name, tensor in tensors.items() if name not in by_row}
    blocks = {name: tensor.split(block) for name, tensor in tensors.items() if name in by_row}
    for i, target in enumerate(out.split(block)):
        rows = {name: parts[i].float() for name, parts in blocks.items()}
        target.copy_(run(arguments._replace(**whole, **rows)))
    return out

"""PyTorch's own oneDNN linear: an operator with an activation or a residual inside, and weights packed beforehand.

In float32 it is about twice as fast as `F.linear`, which takes MKL; no gradient passes through it.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mplug2_fast.ops import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ATTRIBUTE = "_mplug2_fast_packed"


class _Packed:
    """A weight in the layout that oneDNN asks for, and what tells whether the weight is still the one it was."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        # Held, so that no other tensor can come to lie at its address.
        self.source, self.version = weight.detach().flatten(1), weight._version
        self.tensor = torch.ops.mkldnn._reorder_linear_weight(self.source.contiguous(), rows)

    def is_of(self, weight: Tensor) -> bool:
        source = self.source
        return (
            weight.data_ptr() == source.data_ptr()
            and weight._version == self.version
            and weight.dtype == source.dtype
            and weight.shape == source.shape
            and weight.stride() == source.stride()
        )

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
    return found + native.parameter_reasons(x, parameters)


@functools.cache
def _is_available() -> bool:
    return torch.backends.mkldnn.is_available()


def pack(weight: Tensor, rows: int) -> None:
    """Keeps a packed copy beside a weight, for products with about this many rows.

    Args:
        weight: `(out_features, in_features)`, or with more axes, as of a convolution, whose product is that of
            `weight.flatten(1)`.

    It is used as long as the weight stays the same tensor with the same values, and does not show in state dicts.
    Writing through `weight.data` goes unnoticed by torch: call `unpack` first. A weight that was made in inference mode
    is left alone, since torch does not count its changes; so is one that is widened for each product.
    """
    if weight.device.type != "cpu" or weight.is_inference() or not_supported_reasons(weight):
        return
    if multiplies(weight.dtype):
        setattr(weight, _ATTRIBUTE, _Packed(weight, rows))


def unpack(weight: Tensor) -> None:
    """Drops the packed copy, if there is one."""
    vars(weight).pop(_ATTRIBUTE, None)


def packed(weight: Tensor) -> Tensor | None:
    """The packed copy of a weight, or of the one that it is a view of; None where there is none, or where the weight
    has changed since."""
    if weight.dim() != 2:
        weight = weight.flatten(1)
    for holder in (weight, weight._base):
        kept = None if holder is None else getattr(holder, _ATTRIBUTE, None)
        if kept is not None:
            if kept.is_of(weight):
                return kept.tensor
            if not kept.is_of(holder.flatten(1)):  # else another part of it is asked for
                unpack(holder)
    return None


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """`activation(x @ weight.T + bias)` with oneDNN's `"none"`, `"swish"` or `"gelu"` (erf), or with "none" and a
    residual their sum."""
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    kept = packed(weight)
    weight = weight if kept is None else kept
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

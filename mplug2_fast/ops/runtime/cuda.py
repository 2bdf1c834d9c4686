"""What the CUDA kernels of the native module ask of tensors, and how those are handed to them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mplug2_fast._native import native, native_error
from mplug2_fast.ops.runtime.cpu import activation, address, dense, module

DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
CAPABILITY = (9, 0)

_UNIT = 16
"""Bytes that the tensor memory accelerator moves at least, and to multiples of which it wants everything aligned."""


@functools.cache
def error() -> str | None:
    """Why there are no CUDA kernels here; None where there are."""
    if (found := native_error()) is not None:
        return f"there is no native module: {found.reason}"
    # Of a module that was built before it had any, as in a checkout that moved on, there is nothing to ask.
    return getattr(native(), "no_cuda_because", "the native module is older than they are: install it again") or None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def reasons(x: Tensor, **others: Tensor | None) -> list[str]:
    """Why CUDA kernels cannot serve: none here, another GPU, another type, several types. `x` and the others are
    arguments of the operator; None counts for nothing."""
    if found := error():
        return [f"there are no CUDA kernels: {found}"]
    why = []
    if x.device.type == "cuda" and (found := _capability(x.device)) != CAPABILITY:
        why.append(f"CUDA kernels are for compute capability 9.0, not {found[0]}.{found[1]}")
    if x.dtype not in DTYPES:
        why.append(f"CUDA kernels are for bfloat16 and float16, not {x.dtype}")
    for name, other in others.items():
        if other is not None and other.dtype != x.dtype:
            why.append(f"{name} is {other.dtype}, the first argument {x.dtype}")
    return why


def alignment_reasons(*features: int) -> list[str]:
    """Why rows of so many elements of 2 bytes, side by side, cannot be moved by the tensor memory accelerator."""
    return [f"rows must be multiples of {_UNIT // 2} elements, not {size}" for size in features if size % (_UNIT // 2)]


def rows(x: Tensor) -> Tensor:
    """x as `(rows, features)`, of which the tensor memory accelerator can be told where they lie: a copy if x does not
    lie so."""
    x = x.flatten(0, -2) if x.dim() > 1 else x[None]
    stride = x.stride(0) * x.element_size()
    good = dense(x) and x.data_ptr() % _UNIT == 0 and stride % _UNIT == 0 and stride >= x.shape[1] * x.element_size()
    return x if good else x.clone(memory_format=torch.contiguous_format)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, residual: Tensor | None, out: Tensor) -> None:
    """out = residual + activation(x @ weight.T + bias), all of them `(rows, features)` or `(features,)`; out
    contiguous."""
    x, weight = rows(x), rows(weight)
    bias = None if bias is None else rows(bias)
    residual = None if residual is None else rows(residual)
    with torch.cuda.device(x.device):
        module().linear_act_cuda(
            x.dtype == torch.bfloat16,
            (*x.shape, weight.shape[0]),
            x.data_ptr(),
            x.stride(0),
            weight.data_ptr(),
            weight.stride(0),
            address(bias),
            activation(kind),
            address(residual),
            0 if residual is None else residual.stride(0),
            out.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )

"""Input requirements of the native module's CUDA kernels, and helpers to call them."""

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
"""Bytes. The tensor memory accelerator moves multiples of this, at addresses and strides that are multiples of it."""


@functools.cache
def error() -> str | None:
    """Why there are no CUDA kernels here; None if there are."""
    if (found := native_error()) is not None:
        return f"there is no native module: {found.reason}"
    # A module that was built from older sources has no such attribute.
    return getattr(native(), "no_cuda_because", "the native module is older than they are: reinstall it") or None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def reasons(x: Tensor, **others: Tensor | None) -> list[str]:
    """Why CUDA kernels cannot serve these arguments: no kernels here, another GPU, or an unsupported or different
    dtype."""
    if found := error():
        return [f"there are no CUDA kernels: {found}"]
    why = []
    if x.device.type == "cuda" and (found := _capability(x.device)) != CAPABILITY:
        why.append(f"CUDA kernels support compute capability 9.0, got {found[0]}.{found[1]}")
    if x.dtype not in DTYPES:
        why.append(f"CUDA kernels support bfloat16 and float16, got {x.dtype}")
    for name, other in others.items():
        if other is not None and other.dtype != x.dtype:
            why.append(f"{name} is {other.dtype}, the first argument {x.dtype}")
    return why


def alignment_reasons(*features: int) -> list[str]:
    """Why the tensor memory accelerator cannot move contiguous rows of these sizes, in elements of 2 bytes."""
    return [f"rows must be multiples of {_UNIT // 2} elements, got {size}" for size in features if size % (_UNIT // 2)]


def rows(x: Tensor) -> Tensor:
    """x as `(rows, features)`, copied if the tensor memory accelerator cannot address it."""
    x = x.flatten(0, -2) if x.dim() > 1 else x[None]
    stride = x.stride(0) * x.element_size()
    good = dense(x) and x.data_ptr() % _UNIT == 0 and stride % _UNIT == 0 and stride >= x.shape[1] * x.element_size()
    return x if good else x.clone(memory_format=torch.contiguous_format)


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, residual: Tensor | None, out: Tensor) -> None:
    """out = residual + activation(x @ weight.T + bias). All are `(rows, features)` or `(features,)`; out is
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

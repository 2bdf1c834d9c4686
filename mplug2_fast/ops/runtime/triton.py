"""Input requirements of the Triton kernels, and access to them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets its kernels on the CPU, for tests. Triton reads this when it is imported."""

DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)


@functools.cache
def error() -> str | None:
    """Why there are no Triton kernels here, with the remedy; None if there are."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    try:
        importlib.import_module("triton")
        importlib.import_module("mplug2_fast.kernels")
    except Exception as found:
        return (
            f"the Triton kernels cannot be imported ({type(found).__name__}: {found}): reinstall triton or mplug2_fast"
        )
    return None


@functools.cache
def kernels(stem: str) -> ModuleType:
    """The module of an operator's kernels."""
    return importlib.import_module(f"mplug2_fast.kernels.{stem}")


def early_kernels(x: Tensor) -> AbstractContextManager[None]:
    """Inside the context, kernels may start before the previous kernel has ended, to load weights early. So nothing in
    it may write weights, as casting them under autocast would.

    Args:
        x: the tensor that was computed last.
    """
    if x.device.type != "cuda" or torch.is_autocast_enabled("cuda") or error():
        return nullcontext()
    return kernels("_launch").overlapped()


def dtype_reasons(dtype: torch.dtype) -> list[str]:
    """Why Triton kernels cannot compute in this dtype, or at all."""
    if found := error():
        return [found]
    if dtype not in DTYPES:
        return [f"Triton kernels support float32, bfloat16 and float16, got {dtype}"]
    if INTERPRETED and dtype == torch.bfloat16:
        return ["Triton's interpreter computes wrongly in bfloat16"]
    return []


def reasons(x: Tensor, **others: Tensor | None) -> list[str]:
    """Why Triton kernels cannot serve these arguments: `dtype_reasons` of x, or different dtypes."""
    if found := error():
        return [found]
    why = dtype_reasons(x.dtype)
    for name, other in others.items():
        if other is not None and other.dtype != x.dtype:
            why.append(f"{name} is {other.dtype}, the first argument {x.dtype}")
    return why

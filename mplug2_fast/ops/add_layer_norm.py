"""Residual addition and layer norm in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mplug2_fast.ops.layer_norm import SPEC as NORM
from mplug2_fast.ops.layer_norm import (
    check,
    norm_backward_triton,
    norm_native,
    norm_reference,
    norm_torch,
    norm_triton,
    triton_reasons,
)
from mplug2_fast.ops.layer_norm import make as make_norm
from mplug2_fast.ops.runtime import apex, cpu, triton
from mplug2_fast.ops.runtime.dispatch import Backend, Op
from mplug2_fast.ops.runtime.spec import Spec, normal
from mplug2_fast.ops.runtime.spec import upcast as in_float64


def reference(
    x: Tensor,
    update: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float,
    return_sum: bool,
    *,
    upcast: bool = False,
) -> tuple[Tensor, Tensor]:
    """layer_norm(x + scale·update), and the sum, which is empty where it is not asked for."""
    if upcast:
        x, update, weight, bias = in_float64(x, update, weight, bias)
    total = x + scale * update
    return norm_reference(total, weight, bias, eps), total if return_sum else x.new_empty(0)


def make(generator: torch.Generator, *, return_sum: bool = True, scale: float = 1.0, **sizes: Any) -> dict[str, Any]:
    made = make_norm(generator, **sizes)
    update = normal(generator, *made["x"].shape[:-1], made["x"].shape[-1])
    return {
        "x": made["x"],
        "update": update,
        "weight": made["weight"],
        "bias": made["bias"],
        "eps": 1e-5,
        "scale": scale,
        "return_sum": return_sum,
    }


def run_torch(x, update, weight, bias, eps, scale, return_sum):
    total = torch.add(x, update, alpha=scale).contiguous()
    return norm_torch(total, weight, bias, eps), total if return_sum else x.new_empty(0)


def run_apex(x, update, weight, bias, eps, scale, return_sum):
    total = torch.add(x, update, alpha=scale).contiguous()
    return apex.layer_norm(total, weight, bias, eps), total if return_sum else x.new_empty(0)


def apex_reasons(x, update, weight, bias, *_):
    reasons = apex.reasons(x, weight, bias)
    return reasons if update.dtype == x.dtype else [*reasons, f"update is {update.dtype}, x is {x.dtype}"]


def run_native(x, update, weight, bias, eps, scale, return_sum):
    total = torch.empty_like(x, memory_format=torch.contiguous_format) if return_sum else None
    out = norm_native(x, weight, bias, eps, update, scale, total)
    return out, x.new_empty(0) if total is None else total


def run_triton(x, update, weight, bias, eps, scale, return_sum):
    total = torch.empty_like(x, memory_format=torch.contiguous_format) if return_sum else None
    out = norm_triton(x, weight, bias, eps, update, scale, total)
    return out, x.new_empty(0) if total is None else total


def backward_triton(grads, arguments, _, needs):
    x, update, weight, bias, eps, scale, return_sum = arguments
    return norm_backward_triton(grads if return_sum else grads[:1], x, update, weight, bias, eps, needs, scale)


def fake(x, update, weight, bias, eps, scale, return_sum):
    dtype = torch.promote_types(x.dtype, update.dtype)
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out) if return_sum else out.new_empty(0)


def check_all(x, update, weight, bias, eps, scale, return_sum) -> None:
    if update is None:
        raise TypeError("update must be a tensor of the shape of x, got None: layer_norm is without one")
    check(x, update, weight, bias)


SPEC = Spec(
    name="add_layer_norm",
    axes={
        "x": "(..., channels)",
        "update": "(..., channels)",
        "weight": "(channels,)",
        "bias": "(channels,)",
        "result": "(..., channels), and the sum",
    },
    reference=reference,
    make=make,
    awkward=(
        *NORM.awkward,
        {"rows": (2, 5), "channels": 17, "scale": 0.5},
        {"rows": (3, 7), "channels": 48, "return_sum": False},
    ),
    models=NORM.models,
    flops=lambda x, **_: 10 * x.numel(),
    differentiable=("x", "update", "weight", "bias"),
)

OP = Op(
    SPEC,
    "(Tensor x, Tensor update, Tensor? weight, Tensor? bias, float eps, float scale, bool return_sum) "
    "-> (Tensor, Tensor)",
    [
        Backend(
            "cpu",
            run_native,
            lambda x, update, weight, bias, *_: cpu.reasons(x, update=update, weight=weight, bias=bias),
            devices=("cpu",),
        ),
        Backend(
            "triton",
            run_triton,
            lambda x, update, *_: triton_reasons(x, update=update),
            devices=triton.DEVICES,
            backward=backward_triton,
        ),
        Backend("apex", run_apex, apex_reasons, devices=("cuda",), differentiable=True),
        Backend("torch", run_torch, differentiable=True),
    ],
    fake=fake,
    check=check_all,
)


def _arguments(x, update, weight=None, bias=None, *, eps=1e-5, scale=1.0, return_sum=False):
    return x, update, weight, bias, eps, scale, return_sum


def add_layer_norm(
    x: Tensor,
    update: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    scale: float = 1.0,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm of `x + scale·update` over the last axis, with statistics in float32.

    Args:
        x, update: `(..., channels)`, of one shape, any strides. weight, bias: `(channels,)`, or None.
        return_sum: for pre-norm blocks, which go on with the sum: returns (normed, sum). Post-norm blocks need only
            the norm.

    Returns new contiguous tensors of x's shape and dtype.

    Raises:
        ValueError: shapes that do not go together.
    """
    out, total = OP(*_arguments(x, update, weight, bias, eps=eps, scale=scale, return_sum=return_sum))
    return (out, total) if return_sum else out


add_layer_norm.op, add_layer_norm.arguments = OP, _arguments  # type: ignore[attr-defined]

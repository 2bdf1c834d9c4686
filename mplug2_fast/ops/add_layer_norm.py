"""Residual addition and layer norm in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from mplug2_fast.ops.layer_norm import SPEC as NORM
from mplug2_fast.ops.layer_norm import (
    check_norm,
    norm_backward_triton,
    norm_cpu,
    norm_reference,
    norm_torch,
    norm_triton,
    norm_triton_reasons,
)
from mplug2_fast.ops.runtime import apex, cpu, triton
from mplug2_fast.ops.runtime.backend import Backend
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.spec import Spec, normal

NormAndSum = tuple[Tensor, Tensor]
"""The sum is empty without `return_sum`."""


class Arguments(NamedTuple):
    x: Annotated[Tensor, "(..., channels)"]
    update: Annotated[Tensor, "(..., channels)"]
    weight: Annotated[Tensor | None, "(channels,)"]
    bias: Annotated[Tensor | None, "(channels,)"]
    eps: float
    scale: float
    return_sum: bool


def make_inputs(generator: torch.Generator, *, return_sum: bool = True, scale: float = 1.0, **sizes: Any) -> Arguments:
    x, weight, bias, eps = NORM.make_inputs(generator, **sizes)
    return Arguments(x, normal(generator, *x.shape), weight, bias, eps, scale, return_sum)


def check(a: Arguments) -> None:
    if a.update is None:
        raise TypeError("update must be a tensor of x's shape, got None: use layer_norm for no update")
    if a.update.shape != a.x.shape:
        raise ValueError(f"update must have the shape of x, {tuple(a.x.shape)}, got {tuple(a.update.shape)}")
    check_norm(a.x, a.weight, a.bias)


def reference(a: Arguments) -> NormAndSum:
    """layer_norm(x + scale·update), and the sum."""
    total = a.x + a.scale * a.update
    return norm_reference(total, a.weight, a.bias, a.eps), total if a.return_sum else a.x.new_empty(0)


def _add_then(norm: Callable[..., Tensor]) -> Callable[[Arguments], NormAndSum]:
    """A separate pass for the sum, then this norm."""

    def run(a: Arguments) -> NormAndSum:
        total = torch.add(a.x, a.update, alpha=a.scale).contiguous()
        return norm(total, a.weight, a.bias, a.eps), total if a.return_sum else a.x.new_empty(0)

    return run


def _fused(norm: Callable[..., Tensor]) -> Callable[[Arguments], NormAndSum]:
    """A kernel that adds, normalises and writes the sum."""

    def run(a: Arguments) -> NormAndSum:
        total = torch.empty_like(a.x, memory_format=torch.contiguous_format) if a.return_sum else None
        out = norm(a.x, a.weight, a.bias, a.eps, a.update, a.scale, total)
        return out, a.x.new_empty(0) if total is None else total

    return run


def backward_triton(grads: list[Tensor | None], a: Arguments, saved: list[Tensor], needs: list[bool]) -> list[Tensor]:
    grads = grads if a.return_sum else grads[:1]
    return norm_backward_triton(grads, a.x, a.update, a.weight, a.bias, a.eps, needs, a.scale)


def apex_reasons(a: Arguments) -> list[str]:
    reasons = apex.reasons(a.x, a.weight, a.bias)
    return reasons if a.update.dtype == a.x.dtype else [*reasons, f"update is {a.update.dtype}, x is {a.x.dtype}"]


def fake(a: Arguments) -> NormAndSum:
    dtype = torch.promote_types(a.x.dtype, a.update.dtype)
    out = torch.empty_like(a.x, dtype=dtype, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out) if a.return_sum else out.new_empty(0)


SPEC = Spec(
    name="add_layer_norm",
    arguments=Arguments,
    results=("(..., channels)", "the sum"),
    eager=reference,
    make_inputs=make_inputs,
    edge_cases=(
        *NORM.edge_cases,
        {"rows": (2, 5), "channels": 17, "scale": 0.5},
        {"rows": (3, 7), "channels": 48, "return_sum": False},
    ),
    models=NORM.models,
    count_flops=lambda a: 10 * a.x.numel(),
    differentiable=("x", "update", "weight", "bias"),
)

OP: Op[NormAndSum] = Op(
    SPEC,
    [
        Backend(
            "cpu",
            _fused(norm_cpu),
            lambda a: cpu.reasons(a.x, update=a.update, weight=a.weight, bias=a.bias),
            devices=("cpu",),
        ),
        Backend(
            "triton",
            _fused(norm_triton),
            lambda a: norm_triton_reasons(a.x, update=a.update),
            devices=triton.DEVICES,
            backward=backward_triton,
        ),
        Backend("apex", _add_then(apex.layer_norm), apex_reasons, devices=("cuda",), differentiable=True),
        Backend("torch", _add_then(norm_torch), differentiable=True),
    ],
    fake=fake,
    check=check,
)


@OP.public
def add_layer_norm(
    x: Tensor,
    update: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    scale: float = 1.0,
    return_sum: bool = False,
) -> Tensor | NormAndSum:
    """Layer norm of `x + scale·update` over the last axis, with statistics in float32.

    Args:
        x, update: `(..., channels)`, of one shape, any strides. weight, bias: `(channels,)`, or None.
        return_sum: returns (normed, sum), for pre-norm blocks, which continue with the sum. Post-norm blocks need only
            the norm.

    Returns new contiguous tensors of x's shape and dtype.

    Raises:
        ValueError: mismatched shapes.
    """
    out, total = OP(x, update, weight, bias, eps, scale, return_sum)
    return (out, total) if return_sum else out

"""Layer norm over the last axis."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops.runtime import apex, cpu, triton
from mplug2_fast.ops.runtime.backend import Backend
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.rows import Rows, pair, rows
from mplug2_fast.ops.runtime.spec import Spec, normal

MAX_CHANNELS = 16384
"""Largest row that the Triton kernel keeps in registers."""


class Arguments(NamedTuple):
    x: Annotated[Tensor, "(..., channels)"]
    weight: Annotated[Tensor | None, "(channels,)"]
    bias: Annotated[Tensor | None, "(channels,)"]
    eps: float


def norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / √(variance + eps) · weight + bias, operation by operation."""
    centred = x - x.mean(dim=-1, keepdim=True)
    out = centred * (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def make_inputs(
    generator: torch.Generator, *, rows: tuple[int, ...], channels: int, affine: bool = True, strided: bool = False
) -> Arguments:
    x = normal(generator, *rows, channels * (1 + strided))
    x = x[..., 1 : 1 + channels] if strided else x
    weight, bias = (normal(generator, channels) if affine else None for _ in range(2))
    return Arguments(x * 2 + 0.5, weight, bias, 1e-5)


def check_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    shape = x.shape
    if not shape:
        raise ValueError(f"x must have channels in its last axis, got shape {tuple(shape)}")
    channels = (shape[-1],)
    if weight is not None and weight.shape != channels:
        raise ValueError(f"weight must have shape {channels} like the last axis of x, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != channels:
        raise ValueError(f"bias must have shape {channels} like the last axis of x, got {tuple(bias.shape)}")


def norm_torch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """If the parameters have another dtype, as under autocast, computes in the wider of both. Gradients go through
    float32: PyTorch's own backward sums rows in the parameters' dtype, 1% wrong in bfloat16 after 257 rows."""
    wide = torch.promote_types(x.dtype, x.dtype if weight is None else weight.dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        wide = torch.promote_types(wide, torch.float32)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(x.dtype).contiguous()


def norm_cpu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    update: Tensor | None = None,
    scale: float = 1.0,
    total: Tensor | None = None,
) -> Tensor:
    """Layer norm of x + scale·update, by the native kernel, which writes the sum to `total`.

    Args:
        x, update: of one shape. weight, bias: contiguous.
    """
    # The first form makes a call of the kernel 10% faster.
    out = torch.empty_like(x) if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
    elements = x.numel()
    if elements == 0:
        return out
    if update is None:
        (x, sizes, strides), update_strides = rows(x), (0, 0)
    else:
        (x, sizes, strides), (update, _, update_strides) = pair(x, update)
    cpu.module().layer_norm(
        cpu.isa(),
        x.dtype is torch.bfloat16,
        cpu.threads(elements),
        (*sizes, x.shape[-1]),
        x.data_ptr(),
        strides,
        0 if update is None else update.data_ptr(),
        update_strides,
        scale,
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        eps,
        out.data_ptr(),
        0 if total is None else total.data_ptr(),
    )
    return out


def norm_triton(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    update: Tensor | None = None,
    scale: float = 1.0,
    total: Tensor | None = None,
) -> Tensor:
    """As `norm_cpu`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
        triton.kernels("layer_norm").forward(*_pair(x, update), weight, bias, eps, out, scale, total)
    return out


def norm_backward_triton(
    grads: list[Tensor | None],
    x: Tensor,
    update: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: list[bool],
    scale: float = 1.0,
) -> list[Tensor]:
    """The needed gradients among those of x, update (unless None), weight and bias.

    Args:
        grads: the gradient of the norm, and that of the sum if the operator returned it.
    """
    names = ("x", "weight", "bias") if update is None else ("x", "update", "weight", "bias")
    wants = dict(zip(names, needs, strict=True))
    made = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if wants.get(n) else None for n in ("x", "update")
    ]
    grad, grad_total = (None if g is None else g.contiguous() for g in (*grads, None)[:2])
    grad = torch.zeros_like(x, memory_format=torch.contiguous_format) if grad is None else grad
    if x.numel():
        weights = None if weight is None else weight.contiguous()
        dweight, dbias = triton.kernels("layer_norm").backward(
            grad, grad_total, *_pair(x, update), weights, eps, *made, scale
        )
    else:
        dweight = dbias = x.new_zeros(x.shape[-1:])
    if wants["weight"]:
        made.append(dweight.to(weight.dtype))
    if wants["bias"]:
        made.append(dbias.to(bias.dtype))
    return [gradient for gradient in made if gradient is not None]


def _pair(x: Tensor, update: Tensor | None) -> tuple[Rows, Rows | None]:
    if not cpu.dense(x):
        x = x.contiguous()
    return pair(x, update if update is None or cpu.dense(update) else update.contiguous())


def norm_triton_reasons(x: Tensor, **others: Tensor) -> list[str]:
    reasons = triton.reasons(x, **others)
    if x.shape[-1] > MAX_CHANNELS:
        reasons.append(f"the Triton kernel supports up to {MAX_CHANNELS} channels, got {x.shape[-1]}")
    return reasons


SPEC = Spec(
    name="layer_norm",
    arguments=Arguments,
    results=("(..., channels)",),
    eager=lambda a: norm_reference(*a),
    make_inputs=make_inputs,
    edge_cases=(
        {"rows": (3,), "channels": 3},
        {"rows": (2, 5), "channels": 7},
        {"rows": (5,), "channels": 16},
        {"rows": (3, 5), "channels": 192},
        {"rows": (2, 3, 4), "channels": 33, "affine": False},
        {"rows": (257,), "channels": 1023},
        {"rows": (4, 9), "channels": 64, "strided": True},
        {"rows": (2, 3, 4, 2), "channels": 24, "strided": True},
        {"rows": (0,), "channels": 16},
        {"rows": (), "channels": 40},
    ),
    models={
        "base": {"rows": (1, 16, 197), "channels": 768},
        "large": {"rows": (1, 16, 257), "channels": 1024},
    },
    count_flops=lambda a: 8 * a.x.numel(),
    differentiable=("x", "weight", "bias"),
)

OP: Op[Tensor] = Op(
    SPEC,
    [
        Backend(
            "cpu",
            lambda a: norm_cpu(*a),
            lambda a: cpu.reasons(a.x, weight=a.weight, bias=a.bias),
            devices=("cpu",),
        ),
        Backend(
            "triton",
            lambda a: norm_triton(*a),
            lambda a: norm_triton_reasons(a.x),
            devices=triton.DEVICES,
            backward=lambda grads, a, _, needs: norm_backward_triton(grads, a.x, None, *a[1:], needs),
        ),
        Backend(
            "apex",
            lambda a: apex.layer_norm(*a),
            lambda a: apex.reasons(a.x, a.weight, a.bias),
            devices=("cuda",),
            differentiable=True,
        ),
        Backend("torch", lambda a: norm_torch(*a), differentiable=True),
    ],
    fake=lambda a: torch.empty_like(a.x, memory_format=torch.contiguous_format),
    check=lambda a: check_norm(a.x, a.weight, a.bias),
)


@OP.public
def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """`(x - mean) / √(variance + eps) · weight + bias` over the last axis, with statistics in float32.

    Args:
        x: `(..., channels)`, any strides. weight, bias: `(channels,)`, or None.

    Returns a new contiguous tensor of x's shape and dtype.

    Raises:
        ValueError: mismatched shapes.
    """
    return OP(x, weight, bias, eps)

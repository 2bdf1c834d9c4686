"""Layer norm over the last axis."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops.runtime import apex, cpu, triton
from mplug2_fast.ops.runtime.dispatch import Backend, Op
from mplug2_fast.ops.runtime.rows import Rows, pair, rows
from mplug2_fast.ops.runtime.spec import Spec, normal
from mplug2_fast.ops.runtime.spec import upcast as in_float64

MAX_CHANNELS = 16384
"""Of the Triton kernel."""


def norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, upcast: bool = False
) -> Tensor:
    """(x - mean) / √(variance + eps) · weight + bias, operation by operation."""
    if upcast:
        x, weight, bias = in_float64(x, weight, bias)
    centred = x - x.mean(dim=-1, keepdim=True)
    out = centred * (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def make(generator: torch.Generator, *, rows: tuple[int, ...], channels: int, affine: bool = True, strided=False):
    x = normal(generator, *rows, channels * (1 + strided))
    x = x[..., 1 : 1 + channels] if strided else x
    return {
        "x": x * 2 + 0.5,
        "weight": normal(generator, channels) if affine else None,
        "bias": normal(generator, channels) if affine else None,
        "eps": 1e-5,
    }


def norm_torch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Parameters of another type, as under autocast, are met in the wider of both. Gradients go through float32: those
    of PyTorch's own operator add up rows in the type of the parameters, 1% wrong in bfloat16 after 257 rows."""
    wide = torch.promote_types(x.dtype, x.dtype if weight is None else weight.dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        wide = torch.promote_types(wide, torch.float32)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(x.dtype).contiguous()


def norm_native(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    update: Tensor | None = None,
    scale: float = 1.0,
    total: Tensor | None = None,
) -> Tensor:
    """Layer norm of x + scale·update, which is left in `total`. x and update have the same shape; weight and bias are
    dense."""
    # The first form is the faster by a tenth of what calling the kernel costs.
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
        x.dtype == torch.bfloat16,
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
    """As `norm_native`."""
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
    """The gradients that are needed of x, update where there is one, weight and bias.

    Args:
        grads: of the norm, and of the sum where there is one.
    """
    wants = dict(
        zip(("x", "weight", "bias") if update is None else ("x", "update", "weight", "bias"), needs, strict=True)
    )
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


def triton_reasons(x: Tensor, **others: Tensor) -> list[str]:
    reasons = triton.reasons(x, **others)
    if x.shape[-1] > MAX_CHANNELS:
        reasons.append(f"the Triton kernel holds a row in registers, up to {MAX_CHANNELS} channels, not {x.shape[-1]}")
    return reasons


SPEC = Spec(
    name="layer_norm",
    axes={"x": "(..., channels)", "weight": "(channels,)", "bias": "(channels,)", "result": "(..., channels)"},
    reference=norm_reference,
    make=make,
    awkward=(
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
    flops=lambda x, **_: 8 * x.numel(),
    differentiable=("x", "weight", "bias"),
)


def check(x: Tensor, update: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    shape = x.shape
    if not shape:
        raise ValueError(f"x must have channels in its last axis, got shape {tuple(shape)}")
    if update is not None and update.shape != shape:
        raise ValueError(f"update must have the shape of x, {tuple(shape)}, got {tuple(update.shape)}")
    channels = (shape[-1],)
    if weight is not None and weight.shape != channels:
        raise ValueError(f"weight must have shape {channels} like the last axis of x, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != channels:
        raise ValueError(f"bias must have shape {channels} like the last axis of x, got {tuple(bias.shape)}")


OP = Op(
    SPEC,
    "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    [
        Backend(
            "cpu",
            norm_native,
            lambda x, weight, bias, eps: cpu.reasons(x, weight=weight, bias=bias),
            devices=("cpu",),
        ),
        Backend(
            "triton",
            norm_triton,
            lambda x, *_: triton_reasons(x),
            devices=triton.DEVICES,
            backward=lambda grads, arguments, _, needs: norm_backward_triton(
                grads, arguments[0], None, *arguments[1:], needs
            ),
        ),
        Backend(
            "apex",
            apex.layer_norm,
            lambda x, weight, bias, _: apex.reasons(x, weight, bias),
            devices=("cuda",),
            differentiable=True,
        ),
        Backend("torch", norm_torch, differentiable=True),
    ],
    fake=lambda x, weight, bias, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
    check=lambda x, weight, bias, eps: check(x, None, weight, bias),
)


@OP.public
def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """`(x - mean) / √(variance + eps) · weight + bias` over the last axis, with statistics in float32.

    Args:
        x: `(..., channels)`, any strides. weight, bias: `(channels,)`, or None.

    Returns a new contiguous tensor of x's shape and dtype.

    Raises:
        ValueError: shapes that do not go together.
    """
    return x, weight, bias, eps  # type: ignore[return-value]

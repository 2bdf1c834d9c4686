"""Linear layer with its activation, and the residual after it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops import native, onednn
from mplug2_fast.ops.dispatch import Backend, Op
from mplug2_fast.ops.spec import Spec, normal
from mplug2_fast.ops.spec import upcast as in_float64

Activation = Literal["none", "gelu", "quick_gelu"]

QUICK_GELU_SCALE = 1.702
FEW_ROWS = 64
"""Up to so many rows the work is reading the weight, which our own kernel does once, unpacked."""


def quick_gelu(x: Tensor) -> Tensor:
    """x·sigmoid(1.702·x), of any shape (CLIP's activation)."""
    return x * torch.sigmoid(QUICK_GELU_SCALE * x)


EAGER = {"none": lambda x: x, "gelu": F.gelu, "quick_gelu": quick_gelu}


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    residual: Tensor | None,
    *,
    upcast: bool = False,
) -> Tensor:
    """residual + activation(x @ weight.T + bias)."""
    if upcast:
        x, weight, bias, residual = in_float64(x, weight, bias, residual)
    out = EAGER[activation](F.linear(x, weight, bias))
    return out if residual is None else residual + out


def make(
    generator: torch.Generator,
    *,
    rows: tuple[int, ...],
    inputs: int,
    outputs: int,
    activation: Activation = "none",
    bias: bool = True,
    residual: bool = False,
    strided: bool = False,
) -> dict[str, Any]:
    x = normal(generator, *rows, inputs * (1 + strided))
    return {
        "x": x[..., :inputs],
        "weight": normal(generator, outputs, inputs, scale=inputs**-0.5),
        "bias": normal(generator, outputs) if bias else None,
        "activation": activation,
        "residual": normal(generator, *rows, outputs) if residual else None,
    }


def run_torch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    out = EAGER[activation](F.linear(x, weight, bias))
    return out if residual is None else residual + out


def run_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    if x.numel() <= FEW_ROWS * x.shape[-1] and has_few_rows_kernel(x, weight):
        return few_rows(x, weight, bias, activation, residual)
    if activation == "quick_gelu":  # SiLU(1.702·z) / 1.702
        scaled = None if bias is None else bias * QUICK_GELU_SCALE
        out = onednn.linear(x * QUICK_GELU_SCALE, weight, scaled, "swish")
        if residual is None:
            return out.mul_(1 / QUICK_GELU_SCALE)
        return torch.add(residual, out, alpha=1 / QUICK_GELU_SCALE, out=out)
    if residual is not None and activation == "none":
        return onednn.linear(x, weight, bias, residual=residual)
    out = onednn.linear(x, weight, bias, activation)
    return out if residual is None else out.add_(residual)


def has_few_rows_kernel(x: Tensor, weight: Tensor) -> bool:
    return x.dtype in native.DTYPES and weight.is_contiguous() and native.available()


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    """The native kernel, which reads each weight once; the others are small and are copied if they have to be."""
    outputs, inputs = weight.shape
    out = x.new_empty(*x.shape[:-1], outputs)
    x = x.contiguous()
    bias, residual = (None if t is None else t.contiguous() for t in (bias, residual))
    native.module().linear_act(
        native.isa(),
        x.dtype == torch.bfloat16,
        native.threads(weight.numel()),
        (x.numel() // inputs, inputs, outputs),
        x.data_ptr(),
        inputs,
        weight.data_ptr(),
        native.address(bias),
        native.activation(activation),
        native.address(residual),
        out.data_ptr(),
    )
    return out


def not_supported_reasons(x, weight, bias, activation, residual) -> list[str]:
    return onednn.not_supported_reasons(x, weight, bias, residual)


SPEC = Spec(
    name="linear_act",
    axes={
        "x": "(..., in_features)",
        "weight": "(out_features, in_features)",
        "bias": "(out_features,)",
        "residual": "(..., out_features)",
        "result": "(..., out_features)",
    },
    reference=reference,
    make=make,
    awkward=(
        {"rows": (1,), "inputs": 8, "outputs": 19},
        {"rows": (5,), "inputs": 33, "outputs": 70, "activation": "gelu", "residual": True},
        {"rows": (2, 3), "inputs": 1023, "outputs": 5, "activation": "quick_gelu", "bias": False},
        {"rows": (64,), "inputs": 64, "outputs": 48, "residual": True},
        {"rows": (65,), "inputs": 64, "outputs": 48, "activation": "quick_gelu", "residual": True},
        {"rows": (2, 5, 7), "inputs": 64, "outputs": 19, "activation": "gelu", "residual": True},
        {"rows": (257,), "inputs": 1, "outputs": 19, "residual": True},
        {"rows": (8, 9), "inputs": 20, "outputs": 31, "strided": True},
        {"rows": (3, 2), "inputs": 20, "outputs": 31, "strided": True, "activation": "gelu"},
        {"rows": (0,), "inputs": 16, "outputs": 19},
        {"rows": (), "inputs": 16, "outputs": 19, "activation": "gelu"},
    ),
    models={
        "base": {"rows": (1, 16, 197), "inputs": 768, "outputs": 3072, "activation": "gelu"},
        "large": {"rows": (1, 16, 257), "inputs": 1024, "outputs": 4096, "activation": "gelu"},
    },
    flops=lambda x, weight, **_: 2 * x.numel() * weight.shape[0],
    differentiable=("x", "weight", "bias", "residual"),
)

OP = Op(
    SPEC,
    "(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? residual) -> Tensor",
    [
        Backend("cpu", run_cpu, not_supported_reasons, devices=("cpu",)),
        Backend("torch", run_torch, differentiable=True),
    ],
    fake=lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]),
    autocast=True,
)


@OP.public
def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "none",
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """`residual + activation(x @ weight.T + bias)`.

    Args:
        x: `(..., in_features)`. weight: `(out_features, in_features)`. bias: `(out_features,)`.
        activation: `"none"`, `"gelu"` (the erf form) or `"quick_gelu"` (x·sigmoid(1.702·x)).
        residual: `(..., out_features)`.

    Returns `(..., out_features)` in x's dtype, contiguous.

    Raises:
        ValueError: shapes that do not go together, or an unknown activation.
    """
    check(x, weight, bias, activation)
    if residual is not None and residual.shape != (*x.shape[:-1], weight.shape[0]):
        raise ValueError(f"residual must have shape {(*x.shape[:-1], weight.shape[0])}, got {tuple(residual.shape)}")
    return x, weight, bias, activation, residual  # type: ignore[return-value]


def check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    if activation not in EAGER:
        raise ValueError(f"activation is {activation!r}: it must be one of {', '.join(EAGER)}")
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be (..., in_features) and weight (out_features, in_features), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")

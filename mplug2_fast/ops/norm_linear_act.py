"""Layer norm, the linear layer after it and its activation; the norm is returned too, as the next residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops.layer_norm import check as check_norm
from mplug2_fast.ops.layer_norm import norm_native, norm_reference, norm_torch, norm_triton
from mplug2_fast.ops.layer_norm import triton_reasons as norm_reasons
from mplug2_fast.ops.linear_act import EAGER, Activation
from mplug2_fast.ops.linear_act import OP as LINEAR
from mplug2_fast.ops.linear_act import check as check_linear
from mplug2_fast.ops.linear_act import not_supported_reasons as linear_reasons
from mplug2_fast.ops.linear_act import run_cpu as linear_cpu
from mplug2_fast.ops.linear_act import run_torch as linear_torch
from mplug2_fast.ops.linear_act import triton_reasons as linear_triton_reasons
from mplug2_fast.ops.runtime import cpu, triton
from mplug2_fast.ops.runtime.dispatch import Backend, Op
from mplug2_fast.ops.runtime.rows import rows as rows_of
from mplug2_fast.ops.runtime.spec import Spec, normal
from mplug2_fast.ops.runtime.spec import upcast as in_float64


def reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    eps: float,
    *,
    upcast: bool = False,
) -> tuple[Tensor, Tensor]:
    """activation(layer_norm(x) @ weight.T + bias), and layer_norm(x)."""
    if upcast:
        x, norm_weight, norm_bias, weight, bias = in_float64(x, norm_weight, norm_bias, weight, bias)
    normed = norm_reference(x, norm_weight, norm_bias, eps)
    return EAGER[activation](F.linear(normed, weight, bias)), normed


def make(
    generator: torch.Generator,
    *,
    rows: tuple[int, ...],
    inputs: int,
    outputs: int,
    activation: Activation = "none",
    bias: bool = True,
    strided: bool = False,
) -> dict[str, Any]:
    x = normal(generator, *rows, inputs * (1 + strided))
    return {
        "x": x[..., :inputs] * 2 + 0.5,
        "norm_weight": normal(generator, inputs),
        "norm_bias": normal(generator, inputs),
        "weight": normal(generator, outputs, inputs, scale=inputs**-0.5),
        "bias": normal(generator, outputs) if bias else None,
        "activation": activation,
        "eps": 1e-5,
    }


def run_torch(x, norm_weight, norm_bias, weight, bias, activation, eps) -> tuple[Tensor, Tensor]:
    normed = norm_torch(x, norm_weight, norm_bias, eps)
    return linear_torch(normed, weight, bias, activation, None), normed


def run_cpu(x, norm_weight, norm_bias, weight, bias, activation, eps) -> tuple[Tensor, Tensor]:
    normed = norm_native(x, norm_weight, norm_bias, eps)
    return linear_cpu(normed, weight, bias, activation, None), normed


def cpu_reasons(x, norm_weight, norm_bias, weight, bias, activation, eps) -> list[str]:
    reasons = cpu.reasons(x, norm_weight=norm_weight, norm_bias=norm_bias)
    return [*reasons, *linear_reasons(x, weight, bias, activation, None)]


def run_triton(x, norm_weight, norm_bias, weight, bias, activation, eps) -> tuple[Tensor, Tensor]:
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    if out.numel() == 0:
        return out, normed
    x, weight = (t if cpu.dense(t) else t.contiguous() for t in (x, weight))
    norm_weight, norm_bias, bias = (None if t is None else t.contiguous() for t in (norm_weight, norm_bias, bias))
    rows = rows_of(x)
    if triton.kernels("linear_act").is_few(rows, weight):
        norm = (norm_weight, norm_bias, eps)
        triton.kernels("few_rows").forward(rows, weight, bias, activation, None, out, norm, normed)
        return out, normed
    normed = norm_triton(x, norm_weight, norm_bias, eps)
    arguments = (normed, weight, bias, activation, None)
    return LINEAR.choose(arguments).run(*arguments), normed


def triton_reasons(x, norm_weight, norm_bias, weight, bias, activation, eps) -> list[str]:
    reasons = triton.reasons(x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias)
    return reasons or [*norm_reasons(x), *linear_triton_reasons(x, weight, bias, activation, None)]


def check(x, norm_weight, norm_bias, weight, bias, activation, eps) -> None:
    check_norm(x, None, norm_weight, norm_bias)
    check_linear(x, weight, bias, activation)


SPEC = Spec(
    name="norm_linear_act",
    axes={
        "x": "(..., in_features)",
        "norm_weight": "(in_features,)",
        "norm_bias": "(in_features,)",
        "weight": "(out_features, in_features)",
        "bias": "(out_features,)",
        "result": "(..., out_features), and the norm (..., in_features)",
    },
    reference=reference,
    make=make,
    awkward=(
        {"rows": (1,), "inputs": 8, "outputs": 19},
        {"rows": (5,), "inputs": 33, "outputs": 70, "activation": "gelu"},
        {"rows": (2, 3), "inputs": 1023, "outputs": 5, "activation": "quick_gelu", "bias": False},
        {"rows": (32,), "inputs": 64, "outputs": 48},
        {"rows": (3, 11), "inputs": 64, "outputs": 19, "activation": "gelu"},
        {"rows": (8, 9), "inputs": 20, "outputs": 31, "strided": True},
        {"rows": (3, 2), "inputs": 1040, "outputs": 31, "strided": True, "activation": "gelu"},
        {"rows": (0,), "inputs": 16, "outputs": 19},
        {"rows": (), "inputs": 16, "outputs": 19, "activation": "gelu"},
    ),
    models={
        "base": {"rows": (1, 5), "inputs": 768, "outputs": 3072, "activation": "gelu"},
        "large": {"rows": (1, 5), "inputs": 1024, "outputs": 4096, "activation": "gelu"},
        "large, words": {"rows": (1, 5), "inputs": 1024, "outputs": 30522},
        "large, steps of 32 videos": {"rows": (32, 5), "inputs": 1024, "outputs": 4096, "activation": "gelu"},
    },
    flops=lambda x, weight, **_: 2 * x.numel() * weight.shape[0],
    products=lambda x, weight, **_: [
        (2 * x.numel() * weight.shape[0], ["x", "norm_weight", "norm_bias"], ["weight"]),
    ],
    differentiable=("x", "norm_weight", "norm_bias", "weight", "bias"),
)

OP = Op(
    SPEC,
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? bias, str activation, float eps) "
    "-> (Tensor, Tensor)",
    [
        Backend("cpu", run_cpu, cpu_reasons, devices=("cpu",)),
        Backend("triton", run_triton, triton_reasons, devices=triton.DEVICES),
        Backend("torch", run_torch, differentiable=True),
    ],
    fake=lambda x, norm_weight, norm_bias, weight, *_: (
        x.new_empty(*x.shape[:-1], weight.shape[0]),
        torch.empty_like(x, memory_format=torch.contiguous_format),
    ),
    check=check,
)


@OP.public
def norm_linear_act(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "none",
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`activation(h @ weight.T + bias)` and h, the layer norm of x.

    These are the steps of a post-norm layer, whose next residual is h. Made for the few rows of a decoding step, which
    it normalises while it reads the weight.

    Args:
        x: `(..., in_features)`. norm_weight, norm_bias: `(in_features,)`. weight: `(out_features, in_features)`.
        bias: `(out_features,)`. activation: as for `linear_act`. eps: added to the variance.

    Returns `(..., out_features)` and `(..., in_features)` in x's dtype, contiguous.

    Raises:
        ValueError: shapes that do not go together, or an unknown activation.
    """
    return x, norm_weight, norm_bias, weight, bias, activation, eps  # type: ignore[return-value]

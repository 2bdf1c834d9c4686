"""Layer norm, the linear layer after it and its activation. Also returns the norm, which is the next residual."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from mplug2_fast.ops.layer_norm import (
    check_norm,
    norm_cpu,
    norm_reference,
    norm_torch,
    norm_triton,
    norm_triton_reasons,
)
from mplug2_fast.ops.linear_act import OP as LINEAR
from mplug2_fast.ops.linear_act import Activation, check_linear, empty_reasons
from mplug2_fast.ops.linear_act import Arguments as LinearArguments
from mplug2_fast.ops.linear_act import run_cpu as linear_cpu
from mplug2_fast.ops.linear_act import run_torch as linear_torch
from mplug2_fast.ops.runtime import cpu, onednn, triton
from mplug2_fast.ops.runtime.backend import Backend
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.rows import rows as rows_of
from mplug2_fast.ops.runtime.spec import Spec, normal

OutAndNorm = tuple[Tensor, Tensor]


class Arguments(NamedTuple):
    x: Annotated[Tensor, "(..., in_features)"]
    norm_weight: Annotated[Tensor, "(in_features,)"]
    norm_bias: Annotated[Tensor, "(in_features,)"]
    weight: Annotated[Tensor, "(out_features, in_features)"]
    bias: Annotated[Tensor | None, "(out_features,)"]
    activation: Activation
    eps: float

    @property
    def norm(self) -> tuple[Tensor, Tensor, Tensor, float]:
        return self.x, self.norm_weight, self.norm_bias, self.eps

    def linear(self, normed: Tensor) -> LinearArguments:
        return LinearArguments(normed, self.weight, self.bias, self.activation, None)


def make_inputs(
    generator: torch.Generator,
    *,
    rows: tuple[int, ...],
    inputs: int,
    outputs: int,
    activation: Activation = "none",
    bias: bool = True,
    strided: bool = False,
) -> Arguments:
    x = normal(generator, *rows, inputs * (1 + strided))
    return Arguments(
        x=x[..., :inputs] * 2 + 0.5,
        norm_weight=normal(generator, inputs),
        norm_bias=normal(generator, inputs),
        weight=normal(generator, outputs, inputs, scale=inputs**-0.5),
        bias=normal(generator, outputs) if bias else None,
        activation=activation,
        eps=1e-5,
    )


def check(a: Arguments) -> None:
    check_norm(a.x, a.norm_weight, a.norm_bias)
    check_linear(a.x, a.weight, a.bias, a.activation)


def reference(a: Arguments) -> OutAndNorm:
    """activation(layer_norm(x) @ weight.T + bias), and layer_norm(x)."""
    normed = norm_reference(*a.norm)
    return linear_torch(a.linear(normed)), normed


def run_torch(a: Arguments) -> OutAndNorm:
    normed = norm_torch(*a.norm)
    return linear_torch(a.linear(normed)), normed


def run_cpu(a: Arguments) -> OutAndNorm:
    normed = norm_cpu(*a.norm)
    return linear_cpu(a.linear(normed)), normed


def cpu_reasons(a: Arguments) -> list[str]:
    reasons = cpu.reasons(a.x, norm_weight=a.norm_weight, norm_bias=a.norm_bias)
    return reasons + onednn.not_supported_reasons(a.x, a.weight, a.bias)


def run_triton(a: Arguments) -> OutAndNorm:
    normed = torch.empty_like(a.x, memory_format=torch.contiguous_format)
    out = a.x.new_empty(*a.x.shape[:-1], a.weight.shape[0])
    if out.numel() == 0:
        return out, normed
    x, weight = (t if cpu.dense(t) else t.contiguous() for t in (a.x, a.weight))
    norm_weight, norm_bias, bias = (None if t is None else t.contiguous() for t in (a.norm_weight, a.norm_bias, a.bias))
    rows = rows_of(x)
    if triton.kernels("linear_act").is_few(rows, weight):
        norm = (norm_weight, norm_bias, a.eps)
        triton.kernels("few_rows").forward(rows, weight, bias, a.activation, None, out, norm, normed)
        return out, normed
    normed = norm_triton(x, norm_weight, norm_bias, a.eps)
    return LINEAR.run(normed, weight, bias, a.activation, None), normed


def triton_reasons(a: Arguments) -> list[str]:
    reasons = triton.reasons(a.x, norm_weight=a.norm_weight, norm_bias=a.norm_bias, weight=a.weight, bias=a.bias)
    return reasons or norm_triton_reasons(a.x) + empty_reasons(a.weight)


SPEC = Spec(
    name="norm_linear_act",
    arguments=Arguments,
    results=("(..., out_features)", "the norm (..., in_features)"),
    eager=reference,
    make_inputs=make_inputs,
    edge_cases=(
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
    count_flops=lambda a: 2 * a.x.numel() * a.weight.shape[0],
    matrix_products=lambda a: [
        (2 * a.x.numel() * a.weight.shape[0], ["x", "norm_weight", "norm_bias"], ["weight"]),
    ],
    differentiable=("x", "norm_weight", "norm_bias", "weight", "bias"),
)

OP: Op[OutAndNorm] = Op(
    SPEC,
    [
        Backend("cpu", run_cpu, cpu_reasons, devices=("cpu",)),
        Backend("triton", run_triton, triton_reasons, devices=triton.DEVICES),
        Backend("torch", run_torch, differentiable=True),
    ],
    fake=lambda a: (
        a.x.new_empty(*a.x.shape[:-1], a.weight.shape[0]),
        torch.empty_like(a.x, memory_format=torch.contiguous_format),
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
) -> OutAndNorm:
    """`activation(h @ weight.T + bias)` and h, the layer norm of x.

    These are the steps of a post-norm layer, whose next residual is h. For the few rows of a decoding step, the kernel
    normalises them while it reads the weight.

    Args:
        x: `(..., in_features)`. norm_weight, norm_bias: `(in_features,)`. weight: `(out_features, in_features)`.
        bias: `(out_features,)`. activation: as for `linear_act`. eps: added to the variance.

    Returns `(..., out_features)` and `(..., in_features)` in x's dtype, contiguous.

    Raises:
        ValueError: mismatched shapes, or an unknown activation.
    """
    return OP(x, norm_weight, norm_bias, weight, bias, activation, eps)

"""Linear layer of 8-bit weights, with an activation and a residual. The rows of x are rounded to whole numbers too."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from mplug2_fast.ops.linear_act import EAGER, Activation, check_linear
from mplug2_fast.ops.runtime import cpu
from mplug2_fast.ops.runtime.backend import Backend
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.spec import Spec, normal

BITS = (8, 16)
"""To how many bits rows of x can be rounded."""
MOST_INPUTS = 1 << 16
"""With more in_features, the sum of products could exceed 32 bits."""


class Arguments(NamedTuple):
    x: Annotated[Tensor, "(..., in_features)"]
    weight: Annotated[Tensor, "(out_features, in_features), int8"]
    scale: Annotated[Tensor, "(out_features,), float32"]
    bias: Annotated[Tensor | None, "(out_features,)"]
    activation: Activation
    residual: Annotated[Tensor | None, "(..., out_features)"]
    bits: int


def make_inputs(
    generator: torch.Generator,
    *,
    rows: tuple[int, ...],
    inputs: int,
    outputs: int,
    activation: Activation = "none",
    bias: bool = True,
    residual: bool = False,
    strided: bool = False,
    bits: int = 8,
) -> Arguments:
    weight = torch.randint(1, 128, (outputs, inputs), generator=generator)
    sign = torch.randint(0, 2, (outputs, inputs), generator=generator) * 2 - 1
    return Arguments(
        x=normal(generator, *rows, inputs * (1 + strided))[..., :inputs],
        weight=(weight * sign).to(torch.int8),
        scale=(normal(generator, outputs).abs() + 0.5) / (64 * max(inputs, 1) ** 0.5),
        bias=normal(generator, outputs) if bias else None,
        activation=activation,
        residual=normal(generator, *rows, outputs) if residual else None,
        bits=bits,
    )


def check(a: Arguments) -> None:
    if a.bits not in BITS:
        raise ValueError(f"bits must be 8 or 16, got {a.bits}")
    check_scaled(a, torch.int8)
    if a.weight.shape[1] > MOST_INPUTS:
        raise ValueError(f"in_features must be at most {MOST_INPUTS}, got {a.weight.shape[1]}")


def check_scaled(a: Any, dtype: torch.dtype) -> None:
    """Checks x, weight, scale, bias, activation and residual of a linear layer whose weight has this dtype."""
    check_linear(a.x, a.weight, a.bias, a.activation)
    if a.weight.dtype != dtype or a.scale.dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        raise TypeError(f"weight must be {name} and scale float32, got {a.weight.dtype} and {a.scale.dtype}")
    if a.scale.shape != a.weight.shape[:1]:
        raise ValueError(f"scale must have shape ({a.weight.shape[0]},), got {tuple(a.scale.shape)}")
    if a.residual is not None and a.residual.shape != (expected := result_shape(a)):
        raise ValueError(f"residual must have shape {expected}, got {tuple(a.residual.shape)}")


def result_shape(a: Any) -> tuple[int, ...]:
    return *a.x.shape[:-1], a.weight.shape[0]


def quantise_rows(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Rounds each row of x `(..., channels)` to whole numbers, ties to even.

    With 16 bits they go from -32767 to 32767. With 8 bits they are 256 neighbours, among them zero, and go from the
    row's least number to its largest: activations such as GELU have hardly any negative numbers.

    Returns the numbers, of x's shape and in its dtype but at least float32, and the scale of each row `(..., 1)` that
    they are multiplied with. The scale of a row that is not finite is NaN.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = x.aminmax(dim=-1, keepdim=True) if x.shape[-1] else (x.new_zeros(*x.shape[:-1], 1),) * 2
    finite = low.isfinite() & high.isfinite()
    low, high = (-low).clamp(min=0), high.clamp(min=0)
    scale = high / full(high, 255) + low / full(low, 255) if bits == 8 else torch.maximum(low, high) / full(low, 32767)
    usable = finite & (scale >= torch.finfo(torch.float32).tiny)
    factor = scale.reciprocal().where(usable, 0)
    least, most = full(low, -32767), full(low, 32767)
    if bits == 8:
        least = -torch.round(low * factor).where(usable, 0)
        most = least + 255
    numbers = torch.round((x * factor).nan_to_num(0).clamp(least, most))
    return numbers, scale.where(usable, 0).where(finite, torch.nan)


def full(like: Tensor, number: int) -> Tensor:
    """A divisor. Divided by a Python number, PyTorch's result may be rounded twice."""
    return torch.full_like(like, number)


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a weight `(out_features, in_features)` to 8 bits, with a scale for each output.

    Returns int8 numbers from -127 to 127 of the weight's shape, and float32 scales `(out_features,)`.
    """
    weight = weight.detach().float()
    scale = (weight.abs().amax(dim=1, keepdim=True) if weight.numel() else weight.new_zeros(len(weight), 1)) / 127
    numbers = torch.round(weight / scale.where(scale > 0, 1)).clamp(-127, 127)
    return numbers.to(torch.int8), scale[:, 0].contiguous()


def run_torch(a: Arguments) -> Tensor:
    """residual + activation(the product of whole numbers, times both scales, + bias)."""
    numbers, scale = quantise_rows(a.x, a.bits)
    # In float64 the sums are exact.
    sums = (numbers.double() @ a.weight.double().t()).to(numbers.dtype)
    out = sums * (a.scale.to(numbers.dtype) * scale)
    out = out if a.bias is None else out + a.bias
    out = EAGER[a.activation](out)
    return (out if a.residual is None else a.residual + out).to(fake_dtype(a))


def run_cpu(a: Arguments) -> Tensor:
    x, weight, residual = a.x.contiguous(), a.weight.contiguous(), a.residual
    bias, scale = (None if t is None else t.contiguous() for t in (a.bias, a.scale))
    residual = None if residual is None else residual.contiguous()
    out = x.new_empty(*result_shape(a))
    outputs, inputs = weight.shape
    cpu.module().linear_int8(
        cpu.isa(),
        x.dtype is torch.bfloat16,
        a.bits,
        cpu.threads(weight.numel()),
        (x.shape[:-1].numel(), inputs, outputs),
        x.data_ptr(),
        inputs,
        weight.data_ptr(),
        scale.data_ptr(),
        cpu.address(bias),
        cpu.activation(a.activation),
        cpu.address(residual),
        out.data_ptr(),
    )
    return out


def cpu_reasons(a: Arguments) -> list[str]:
    return cpu.reasons(a.x) + cpu.parameter_reasons(a.x, [a.bias, a.residual])


def fake_dtype(a: Any) -> torch.dtype:
    return a.x.dtype if a.residual is None else torch.promote_types(a.x.dtype, a.residual.dtype)


SPEC = Spec(
    name="linear_int8",
    arguments=Arguments,
    results=("(..., out_features)",),
    eager=run_torch,
    make_inputs=make_inputs,
    edge_cases=(
        {"rows": (1,), "inputs": 8, "outputs": 19},
        {"rows": (5,), "inputs": 33, "outputs": 70, "activation": "gelu", "residual": True},
        {"rows": (2, 3), "inputs": 1023, "outputs": 5, "activation": "quick_gelu", "bias": False},
        {"rows": (5,), "inputs": 64, "outputs": 48, "residual": True, "bits": 16},
        {"rows": (65,), "inputs": 70, "outputs": 131, "activation": "quick_gelu", "residual": True, "bits": 16},
        {"rows": (2, 5, 7), "inputs": 64, "outputs": 19, "activation": "gelu", "residual": True},
        {"rows": (2, 151), "inputs": 136, "outputs": 200, "activation": "gelu", "residual": True, "strided": True},
        {"rows": (13,), "inputs": 1, "outputs": 19, "residual": True},
        {"rows": (29,), "inputs": 4100, "outputs": 37, "activation": "quick_gelu", "residual": True},
        {"rows": (3,), "inputs": 4100, "outputs": 37, "activation": "gelu", "bits": 16, "strided": True},
        {"rows": (0,), "inputs": 16, "outputs": 19},
        {"rows": (7,), "inputs": 0, "outputs": 19, "residual": True},
        {"rows": (7,), "inputs": 0, "outputs": 19, "bits": 16},
        {"rows": (), "inputs": 16, "outputs": 19, "activation": "gelu", "bits": 16},
    ),
    models={
        "base": {"rows": (1, 16, 197), "inputs": 768, "outputs": 3072, "activation": "quick_gelu"},
        "large": {"rows": (1, 16, 257), "inputs": 1024, "outputs": 4096, "activation": "quick_gelu"},
        "large, back": {"rows": (1, 16, 257), "inputs": 4096, "outputs": 1024, "residual": True},
        "large, step": {"rows": (1, 5), "inputs": 1024, "outputs": 1024, "residual": True, "bits": 16},
        "large, words": {"rows": (1, 5), "inputs": 1024, "outputs": 30522, "bits": 16},
    },
    count_flops=lambda a: 2 * a.x.numel() * a.weight.shape[0],
    kept=("scale",),
)

OP: Op[Tensor] = Op(
    SPEC,
    [
        Backend("cpu", run_cpu, cpu_reasons, devices=("cpu",)),
        Backend("torch", run_torch),
    ],
    fake=lambda a: a.x.new_empty(*result_shape(a), dtype=fake_dtype(a)),
    check=check,
)


@OP.public
def linear_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "none",
    *,
    residual: Tensor | None = None,
    bits: int = 8,
) -> Tensor:
    """`residual + activation(x @ (scale * weight).T + bias)` with x rounded: whole numbers are multiplied.

    Each row of x is rounded to whole numbers, see `quantise_rows`. Sums are exact with 8 bits, and close to it with 16.
    A row of x that is not finite gives NaN. It has no gradients.

    Args:
        x: `(..., in_features)`. weight: `(out_features, in_features)`, int8, from -127 to 127. scale:
            `(out_features,)`, float32, see `quantise_weight`. bias: `(out_features,)`.
        activation: as for `linear_act`. residual: `(..., out_features)`.
        bits: of the whole numbers of x. 8 is for many rows; with 16, which are for the few rows of a decoding step,
            rounding x changes nothing that matters.

    Returns `(..., out_features)` in x's dtype, contiguous.

    Raises:
        ValueError: mismatched shapes, an unknown activation, other bits, or more than 65,536 in_features.
        TypeError: the weight is not int8, or the scale not float32.
    """
    return OP(x, weight, scale, bias, activation, residual, bits)

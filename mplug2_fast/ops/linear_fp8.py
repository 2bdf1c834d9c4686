"""Linear layer of e4m3 weights, after a layer norm if wanted, with an activation and a residual. For GPUs."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from mplug2_fast.ops.layer_norm import MAX_CHANNELS, check_norm, norm_reference
from mplug2_fast.ops.linear_act import EAGER, Activation, empty_reasons
from mplug2_fast.ops.linear_int8 import check_scaled, fake_dtype, full, result_shape
from mplug2_fast.ops.runtime import cpu, triton
from mplug2_fast.ops.runtime.backend import Backend, forced
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.rows import rows as rows_of
from mplug2_fast.ops.runtime.spec import Spec, normal

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest e4m3 number."""
NEEDS = "a GPU of compute capability 8.9 or later"
"""What multiplies e4m3 numbers."""
REMEDY = "use int8 on a CPU and bfloat16 on an older GPU, or use_backend('torch') to see its results and not its speed"

_MANY = 5000
"""Elements of x from which on one of them may be rounded differently after a norm."""


class Arguments(NamedTuple):
    x: Annotated[Tensor, "(..., in_features)"]
    weight: Annotated[Tensor, "(out_features, in_features), float8_e4m3fn"]
    scale: Annotated[Tensor, "(out_features,), float32"]
    bias: Annotated[Tensor | None, "(out_features,)"]
    activation: Activation
    residual: Annotated[Tensor | None, "(..., out_features)"]
    norm_weight: Annotated[Tensor | None, "(in_features,)"]
    norm_bias: Annotated[Tensor | None, "(in_features,)"]
    eps: float


def make_inputs(
    generator: torch.Generator,
    *,
    rows: tuple[int, ...],
    inputs: int,
    outputs: int,
    activation: Activation = "none",
    bias: bool = True,
    residual: bool = False,
    norm: bool = False,
    strided: bool = False,
) -> Arguments:
    weight, scale = quantise_weight(normal(generator, outputs, inputs, scale=max(inputs, 1) ** -0.5))
    return Arguments(
        x=normal(generator, *rows, inputs * (1 + strided))[..., :inputs],
        weight=weight,
        scale=scale,
        bias=normal(generator, outputs) if bias else None,
        activation=activation,
        residual=normal(generator, *rows, outputs) if residual else None,
        norm_weight=normal(generator, inputs) if norm else None,
        norm_bias=normal(generator, inputs) if norm and bias else None,
        eps=1e-5,
    )


def check(a: Arguments) -> None:
    check_scaled(a, DTYPE)
    check_norm(a.x, a.norm_weight, a.norm_bias)
    if a.norm_weight is None and a.norm_bias is not None:
        raise ValueError("norm_bias needs a norm_weight")


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row of x `(..., channels)`, times 448 over its largest absolute number, to e4m3, ties to even.

    Returns the numbers, e4m3, of x's shape, and the float32 scale of each row `(..., 1)` that they are multiplied
    with. x is cast to float32 first. A row that is not finite has numbers of zero and the scale NaN.
    """
    return _rounded(x.float())


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a weight `(out_features, in_features)` to e4m3, with a scale for each output.

    Returns e4m3 numbers of the weight's shape, and float32 scales `(out_features,)`.
    """
    numbers, scale = _rounded(weight.detach().float())
    return numbers, scale[:, 0].contiguous()


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    most = x.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    finite = most.isfinite()
    scale = most / full(most, LARGEST)
    usable = finite & (scale >= torch.finfo(torch.float32).tiny)
    factor = full(most, LARGEST) / most.where(usable, 1)
    numbers = (x * factor).where(usable, 0).to(DTYPE)
    return numbers, scale.where(usable, 0).where(finite, torch.nan)


def run_torch(a: Arguments) -> Tensor:
    """residual + activation(the product of e4m3 numbers, times both scales, + bias)."""
    wide = torch.promote_types(a.x.dtype, torch.float32)
    x, bias, gamma, beta = (None if t is None else t.to(wide) for t in (a.x, a.bias, a.norm_weight, a.norm_bias))
    numbers, scale = quantise_rows(x if gamma is None else norm_reference(x, gamma, beta, a.eps))
    out = numbers.to(wide) @ a.weight.to(wide).t() * (a.scale.to(wide) * scale)
    out = EAGER[a.activation](out if bias is None else out + bias)
    return (out if a.residual is None else a.residual + out).to(fake_dtype(a))


def torch_reasons(a: Arguments) -> list[str]:
    """It is for errors, not for speed, so nobody gets it without asking for it."""
    return [] if forced() == "torch" or a.x.is_meta else [f"e4m3 products need {NEEDS}: {REMEDY}"]


def run_triton(a: Arguments) -> Tensor:
    out = a.x.new_empty(*result_shape(a))
    if out.numel() == 0:
        return out
    kernels = triton.kernels("linear_fp8")
    x, residual = (t if t is None or cpu.dense(t) else t.contiguous() for t in (a.x, a.residual))
    bias, gamma, beta = (None if t is None else t.contiguous() for t in (a.bias, a.norm_weight, a.norm_bias))
    norm = None if gamma is None else (gamma, beta, a.eps)
    rows = x.shape[:-1].numel()
    numbers, scale = x.new_empty(rows, x.shape[-1], dtype=DTYPE), x.new_empty(rows, dtype=torch.float32)
    kernels.quantise(rows_of(x), norm, numbers, scale)
    added = None if residual is None else rows_of(residual)
    kernels.forward(numbers, scale, a.weight.contiguous(), a.scale.contiguous(), bias, a.activation, added, out)
    return out


def triton_reasons(a: Arguments) -> list[str]:
    others = {name: getattr(a, name) for name in ("bias", "residual", "norm_weight", "norm_bias")}
    reasons = triton.reasons(a.x, **others) + empty_reasons(a.weight)
    if a.x.shape[-1] > MAX_CHANNELS:
        reasons.append(f"the Triton kernel supports up to {MAX_CHANNELS} in_features, got {a.x.shape[-1]}")
    return reasons or device_reasons(a.x.device)


def device_reasons(device: torch.device) -> list[str]:
    """Why this device cannot multiply e4m3 numbers."""
    if device.type == "cpu":
        return [] if triton.INTERPRETED else [f"e4m3 products need {NEEDS}, and the device is a CPU"]
    if found := triton.error():
        return [found]
    capability = triton.kernels("_launch").capability(device)
    if capability >= triton.kernels("linear_fp8").MIN_CAPABILITY:
        return []
    return [f"e4m3 products need {NEEDS}, and {device} has {capability // 10}.{capability % 10}"]


def rounding(a: Arguments) -> float:
    """After a norm, whose sums are rounded, a number may become the next e4m3 number, by up to an eighth."""
    return 0.0 if a.norm_weight is None or a.x.numel() < _MANY else 0.4 * a.x.numel() ** -0.5


SPEC = Spec(
    name="linear_fp8",
    arguments=Arguments,
    results=("(..., out_features)",),
    eager=run_torch,
    make_inputs=make_inputs,
    edge_cases=(
        {"rows": (1,), "inputs": 8, "outputs": 19},
        {"rows": (5,), "inputs": 33, "outputs": 70, "activation": "gelu", "residual": True},
        {"rows": (2, 3), "inputs": 1023, "outputs": 5, "activation": "quick_gelu", "bias": False, "norm": True},
        {"rows": (5,), "inputs": 64, "outputs": 48, "residual": True, "norm": True},
        {"rows": (65,), "inputs": 144, "outputs": 136, "activation": "quick_gelu", "residual": True},
        {"rows": (2, 5, 7), "inputs": 64, "outputs": 19, "activation": "gelu", "residual": True},
        {"rows": (2, 151), "inputs": 136, "outputs": 200, "residual": True, "norm": True, "strided": True},
        {"rows": (13,), "inputs": 1, "outputs": 19, "residual": True},
        {"rows": (29,), "inputs": 4100, "outputs": 37, "activation": "quick_gelu", "residual": True},
        {"rows": (0,), "inputs": 16, "outputs": 19},
        {"rows": (), "inputs": 16, "outputs": 19, "activation": "gelu", "norm": True},
    ),
    models={
        "base": {"rows": (1, 16, 197), "inputs": 768, "outputs": 3072, "activation": "quick_gelu", "norm": True},
        "large": {"rows": (1, 16, 257), "inputs": 1024, "outputs": 4096, "activation": "quick_gelu", "norm": True},
        "large, back": {"rows": (1, 16, 257), "inputs": 4096, "outputs": 1024, "residual": True},
    },
    count_flops=lambda a: 2 * a.x.numel() * a.weight.shape[0],
    kept=("weight", "scale"),
    devices=("cuda",),
    rounding=rounding,
)

OP: Op[Tensor] = Op(
    SPEC,
    [
        Backend("triton", run_triton, triton_reasons, devices=triton.DEVICES),
        Backend("torch", run_torch, torch_reasons),
    ],
    fake=lambda a: a.x.new_empty(*result_shape(a), dtype=fake_dtype(a)),
    check=check,
)


@OP.public
def linear_fp8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "none",
    *,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`residual + activation(norm(x) @ (scale * weight).T + bias)` with norm(x) rounded: e4m3 numbers are multiplied.

    Each row is rounded to e4m3, see `quantise_rows`, and sums are float32. A row that is not finite gives NaN. It runs
    on GPUs of compute capability 8.9 or later, and has no gradients.

    Args:
        x: `(..., in_features)`. weight: `(out_features, in_features)`, float8_e4m3fn. scale: `(out_features,)`,
            float32, see `quantise_weight`. bias: `(out_features,)`.
        activation: as for `linear_act`. residual: `(..., out_features)`.
        norm_weight, norm_bias, eps: of a layer norm of x, both `(in_features,)`. Without norm_weight x is not normed.

    Returns `(..., out_features)` in x's dtype, contiguous.

    Raises:
        ValueError: mismatched shapes, an unknown activation, or a norm_bias alone.
        TypeError: the weight is not float8_e4m3fn, or the scale not float32.
        BackendError: the device cannot multiply e4m3 numbers. `use_backend("torch")` computes on any device, slowly.
    """
    return OP(x, weight, scale, bias, activation, residual, norm_weight, norm_bias, eps)

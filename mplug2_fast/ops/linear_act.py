"""Linear layer with its activation, and the residual after it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops.runtime import cpu, cuda, onednn, triton
from mplug2_fast.ops.runtime.dispatch import Backend, Op
from mplug2_fast.ops.runtime.rows import Rows
from mplug2_fast.ops.runtime.rows import rows as rows_of
from mplug2_fast.ops.runtime.spec import Spec, normal
from mplug2_fast.ops.runtime.spec import upcast as in_float64

Activation = Literal["none", "gelu", "quick_gelu"]

QUICK_GELU_SCALE = 1.702
FEW_ROWS = 64
"""Up to so many rows the work is reading the weight, which our own kernel does once, unpacked."""

ALIGNED = 8
"""Elements of 16 bits in 16 bytes."""
CUDA_ROWS, CUDA_PLAIN_ROWS = 2048, 16384
"""From so many rows on the CUDA kernel is faster than the others, and from so many where nothing is fused with the
product: with fewer its tiles do not occupy every multiprocessor."""


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
    if weight.numel() == 0:  # nothing to multiply
        return run_torch(x, weight, bias, activation, residual)
    if x.numel() <= FEW_ROWS * x.shape[-1] and has_few_rows_kernel(x, weight):
        return few_rows(x, weight, bias, activation, residual)
    if not onednn.multiplies(x.dtype):
        return _in_float32(x, weight, bias, activation, residual)
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


def _in_float32(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    def run(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        return run_cpu(x, weight, bias, activation, residual)

    rows = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, residual)]
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    onednn.in_float32(run, out.view(-1, weight.shape[0]), rows, (weight, bias))
    return out


def has_few_rows_kernel(x: Tensor, weight: Tensor) -> bool:
    return x.dtype in cpu.DTYPES and weight.is_contiguous() and cpu.available()


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    """The native kernel, which reads each weight once; the others are small and are copied if they have to be."""
    outputs, inputs = weight.shape
    out = x.new_empty(*x.shape[:-1], outputs)
    x = x.contiguous()
    bias, residual = (None if t is None else t.contiguous() for t in (bias, residual))
    cpu.module().linear_act(
        cpu.isa(),
        x.dtype == torch.bfloat16,
        cpu.threads(weight.numel()),
        (x.numel() // inputs, inputs, outputs),
        x.data_ptr(),
        inputs,
        weight.data_ptr(),
        cpu.address(bias),
        cpu.activation(activation),
        cpu.address(residual),
        out.data_ptr(),
    )
    return out


def not_supported_reasons(x, weight, bias, activation, residual) -> list[str]:
    return onednn.not_supported_reasons(x, weight, bias, residual)


def run_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    if out.numel():
        cuda.linear_act(x, weight, bias, activation, residual, out)
    return out


def cuda_reasons(x, weight, bias, activation, residual) -> list[str]:
    reasons = cuda.reasons(x, weight=weight, bias=bias, residual=residual) or cuda.alignment_reasons(*weight.shape)
    if weight.numel() == 0:
        reasons.append("there is nothing to multiply")
    return reasons


def slower_than_others(needs_grad: bool, x, weight, bias, activation, residual) -> list[str]:
    """What was measured of the CUDA kernel, on an H200."""
    least = CUDA_PLAIN_ROWS if activation == "none" and residual is None else CUDA_ROWS
    return too_few_rows(x, least)


def too_few_rows(x: Tensor, least: int) -> list[str]:
    rows = x.shape[:-1].numel()
    return [f"{rows} rows do not occupy the GPU with its tiles: it is for {least} and more"] if rows < least else []


def run_triton(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    if out.numel():
        kernels = triton.kernels("linear_act")
        arguments = _kernel_arguments(x, weight, bias, activation, residual)

        def ours() -> None:
            kernels.forward(*arguments, out)

        ours()
        if not kernels.is_few(arguments[0], weight):
            race = _race(x, weight, bias, activation, residual)
            kernels.AGAINST_TORCH.run(x.device, race, ours, lambda: run_torch(x, weight, bias, activation, residual))
    return out


def train_triton(x, weight, bias, activation, residual, saved: list[Tensor]) -> Tensor:
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    if out.numel():
        triton.kernels("linear_act").apply(*_kernel_arguments(x, weight, bias, activation, residual), out, *saved)
    return out


def saved_triton(x, weight, bias, activation, residual) -> list[Tensor]:
    """x @ weight.T + bias, where the gradient of an activation needs it."""
    return [] if activation == "none" else [x.new_empty(*x.shape[:-1], weight.shape[0])]


def backward_triton(
    grads: list[Tensor | None], arguments: tuple[Any, ...], saved: list[Tensor], needs: list[bool]
) -> list[Tensor]:
    x, weight, bias, activation, _ = arguments
    wants_x, wants_weight, wants_bias, wants_residual = needs
    outputs = weight.shape[0]
    grad = x.new_zeros(*x.shape[:-1], outputs) if grads[0] is None else grads[0].contiguous()
    dz, dbias = grad.view(-1, outputs), None
    if saved and dz.numel() and (wants_x or wants_weight or wants_bias):
        given, dz = dz, torch.empty_like(dz)
        dbias = triton.kernels("linear_act").backward(
            given, saved[0].view(-1, outputs), activation, dz, None, wants_bias=wants_bias
        )
    elif wants_bias:
        dbias = dz.sum(dim=0, dtype=torch.float32)
    made = []
    if wants_x:
        made.append((dz @ weight).view(x.shape))
    if wants_weight:
        made.append(dz.t() @ x.reshape(-1, x.shape[-1]))
    if wants_bias:
        made.append(dbias.to(bias.dtype))
    if wants_residual:
        made.append(grad)
    return made


def _kernel_arguments(
    x, weight, bias, activation, residual
) -> tuple[Rows, Tensor, Tensor | None, Activation, Rows | None]:
    x, weight, residual = (t if t is None or cpu.dense(t) else t.contiguous() for t in (x, weight, residual))
    bias = None if bias is None else bias.contiguous()
    return rows_of(x), weight, bias, activation, None if residual is None else rows_of(residual)


def triton_reasons(x, weight, bias, activation, residual) -> list[str]:
    reasons = triton.reasons(x, weight=weight, bias=bias, residual=residual)
    if weight.numel() == 0:
        reasons.append("there is nothing to multiply")
    return reasons


def slower_reasons(needs_grad: bool, x, weight, bias, activation, residual) -> list[str]:
    """That which holds for all sizes, and what tuning found, which timed the forward alone. Few rows in a narrow type
    are not raced: how long kernels of two microseconds take is seen in a graph of many, not in one that is timed."""
    kernels = triton.kernels("linear_act")
    if not needs_grad and x.numel() and kernels.is_few(rows_of(x), weight):
        return []
    why = kernels.slower(x.dtype, activation, residual is not None)
    if x.dtype != torch.float32 and weight.shape[0] % ALIGNED:
        why = None  # rows of the result that do not begin on 16 bytes are slow for cuBLAS: it depends
    if why is None and not needs_grad:
        why = kernels.AGAINST_TORCH.lost(x.device, _race(x, weight, bias, activation, residual))
    return [] if why is None else [why]


def _race(x, weight, bias, activation, residual) -> tuple[Any, ...]:
    """What the faster way depends on; rows as the next power of two."""
    rows = 1 << (x.shape[:-1].numel() - 1).bit_length()
    return x.dtype, rows, *weight.shape, activation, bias is not None, residual is not None


def check_activation(activation: str) -> None:
    if activation not in EAGER:
        raise ValueError(f"activation is {activation!r}: it must be one of {', '.join(EAGER)}")


def check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    check_activation(activation)
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be (..., in_features) and weight (out_features, in_features), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def check_all(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> None:
    check(x, weight, bias, activation)
    if residual is not None and residual.shape != (*x.shape[:-1], weight.shape[0]):
        raise ValueError(f"residual must have shape {(*x.shape[:-1], weight.shape[0])}, got {tuple(residual.shape)}")


def fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)


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
        {"rows": (2, 151), "inputs": 136, "outputs": 200, "activation": "gelu", "residual": True, "strided": True},
        {"rows": (257,), "inputs": 1, "outputs": 19, "residual": True},
        {"rows": (8, 9), "inputs": 20, "outputs": 31, "strided": True},
        {"rows": (3, 2), "inputs": 20, "outputs": 31, "strided": True, "activation": "gelu"},
        {"rows": (0,), "inputs": 16, "outputs": 19},
        {"rows": (), "inputs": 16, "outputs": 19, "activation": "gelu"},
    ),
    models={
        "base": {"rows": (1, 16, 197), "inputs": 768, "outputs": 3072, "activation": "gelu"},
        "large": {"rows": (1, 16, 257), "inputs": 1024, "outputs": 4096, "activation": "gelu"},
        "large, step": {"rows": (1, 5), "inputs": 1024, "outputs": 1024, "residual": True},
        "large, steps of 32 videos": {"rows": (32, 5), "inputs": 1024, "outputs": 1024, "residual": True},
    },
    flops=lambda x, weight, **_: 2 * x.numel() * weight.shape[0],
    products=lambda x, weight, **_: [(2 * x.numel() * weight.shape[0], ["x"], ["weight"])],
    differentiable=("x", "weight", "bias", "residual"),
)

OP = Op(
    SPEC,
    "(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? residual) -> Tensor",
    [
        Backend("cpu", run_cpu, not_supported_reasons, devices=("cpu",)),
        Backend("cuda", run_cuda, cuda_reasons, devices=cuda.DEVICES, slower_reasons=slower_than_others),
        Backend(
            "triton",
            run_triton,
            triton_reasons,
            devices=triton.DEVICES,
            backward=backward_triton,
            saved=saved_triton,
            train=train_triton,
            slower_reasons=slower_reasons,
        ),
        Backend("torch", run_torch, differentiable=True),
    ],
    fake=fake,
    check=check_all,
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
    return x, weight, bias, activation, residual  # type: ignore[return-value]

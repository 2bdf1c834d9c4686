"""Linear layer with an activation and a residual."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops.checksum import weights_to_read
from mplug2_fast.ops.runtime import cpu, cuda, onednn, triton
from mplug2_fast.ops.runtime.backend import Backend
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.rows import Rows
from mplug2_fast.ops.runtime.rows import rows as rows_of
from mplug2_fast.ops.runtime.spec import Spec, normal

Activation = Literal["none", "gelu", "quick_gelu"]

QUICK_GELU_SCALE = 1.702
FEW_ROWS = 64
"""Up to this many rows the native kernel reads the unpacked weight once, which takes most of the time."""
MANY_ROWS = 128
"""From this many rows on, the native kernel packs blocks of the weight. In float32 on a processor with AVX2 but without
AVX-512 it is faster than oneDNN: 10 to 20% without an activation, 30% with GELU (Zen 3)."""

ALIGNED = 8
"""Elements of 16 bits in 16 bytes."""
CUDA_ROWS, CUDA_PLAIN_ROWS = 2048, 16384
"""Minimum rows for the CUDA kernel to win: with an activation or a residual, and with neither. With fewer rows its
tiles do not occupy every multiprocessor."""


class Arguments(NamedTuple):
    x: Annotated[Tensor, "(..., in_features)"]
    weight: Annotated[Tensor, "(out_features, in_features)"]
    bias: Annotated[Tensor | None, "(out_features,)"]
    activation: Activation
    residual: Annotated[Tensor | None, "(..., out_features)"]


def quick_gelu(x: Tensor) -> Tensor:
    """x·sigmoid(1.702·x), CLIP's activation, of any shape."""
    return x * torch.sigmoid(QUICK_GELU_SCALE * x)


EAGER = {"none": lambda x: x, "gelu": F.gelu, "quick_gelu": quick_gelu}
"""Each activation in eager code."""


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
) -> Arguments:
    x = normal(generator, *rows, inputs * (1 + strided))
    return Arguments(
        x=x[..., :inputs],
        weight=normal(generator, outputs, inputs, scale=inputs**-0.5),
        bias=normal(generator, outputs) if bias else None,
        activation=activation,
        residual=normal(generator, *rows, outputs) if residual else None,
    )


def check_activation(activation: str) -> None:
    if activation not in EAGER:
        raise ValueError(f"activation is {activation!r}: it must be one of {', '.join(EAGER)}")


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    check_activation(activation)
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be (..., in_features) and weight (out_features, in_features), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def check(a: Arguments) -> None:
    check_linear(a.x, a.weight, a.bias, a.activation)
    if a.residual is not None and a.residual.shape != (expected := _result_shape(a)):
        raise ValueError(f"residual must have shape {expected}, got {tuple(a.residual.shape)}")


def _result_shape(a: Arguments) -> tuple[int, ...]:
    return *a.x.shape[:-1], a.weight.shape[0]


def run_torch(a: Arguments) -> Tensor:
    """residual + activation(x @ weight.T + bias)."""
    out = EAGER[a.activation](F.linear(a.x, a.weight, a.bias))
    return out if a.residual is None else a.residual + out


def run_cpu(a: Arguments) -> Tensor:
    x, weight, bias, activation, residual = a
    if weight.numel() == 0:  # nothing to multiply
        return run_torch(a)
    if is_native(x, weight):
        return run_native(a)
    if not onednn.multiplies(x.dtype):
        rows = a._replace(
            x=x.reshape(-1, x.shape[-1]), residual=None if residual is None else residual.reshape(-1, weight.shape[0])
        )
        out = x.new_empty(*_result_shape(a))
        onednn.in_float32(run_cpu, rows, out.view(-1, weight.shape[0]), by_row=("x", "residual"))
        return out
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


def is_native(x: Tensor, *weights: Tensor) -> bool:
    """Whether the native kernel multiplies x `(..., in_features)` with these weights."""
    if x.dtype not in cpu.DTYPES or not cpu.available() or not all(weight.is_contiguous() for weight in weights):
        return False
    rows = x.shape[:-1].numel()
    return rows <= FEW_ROWS or (rows >= MANY_ROWS and x.dtype is torch.float32 and _has_fast_native_products())


@functools.cache
def _has_fast_native_products() -> bool:
    return cpu.isa() == cpu.module().Isa.avx2


def run_native(a: Arguments, out: Tensor | None = None) -> Tensor:
    """The native kernel, which writes to the contiguous `out`, if given. With few rows it also hashes the weight if
    `reading_weights` needs that. Copies the other tensors if they are not contiguous."""
    outputs, inputs = a.weight.shape
    out = a.x.new_empty(*_result_shape(a)) if out is None else out
    x = a.x.contiguous()
    bias = None if a.bias is None else a.bias.contiguous()
    residual = None if a.residual is None else a.residual.contiguous()
    rows = x.numel() // inputs
    read = weights_to_read() if rows <= FEW_ROWS else None
    module = cpu.module()
    value = (module.linear_act if read is None else module.linear_act_hashed)(
        cpu.isa(),
        x.dtype is torch.bfloat16,
        cpu.threads(a.weight.numel()),
        (rows, inputs, outputs),
        x.data_ptr(),
        inputs,
        a.weight.data_ptr(),
        cpu.address(bias),
        cpu.activation(a.activation),
        cpu.address(residual),
        out.data_ptr(),
    )
    if read is not None and value is not None:
        read.add(a.weight, value)
    return out


def run_cuda(a: Arguments) -> Tensor:
    out = a.x.new_empty(*_result_shape(a))
    if out.numel():
        cuda.linear_act(*a, out)
    return out


def cuda_reasons(a: Arguments) -> list[str]:
    reasons = cuda.reasons(a.x, weight=a.weight, bias=a.bias, residual=a.residual)
    return (reasons or cuda.alignment_reasons(*a.weight.shape)) + empty_reasons(a.weight)


def empty_reasons(weight: Tensor) -> list[str]:
    return [] if weight.numel() else ["the weight is empty"]


def cuda_slower_reasons(needs_grad: bool, a: Arguments) -> list[str]:
    """As measured on an H200."""
    return too_few_rows(a.x, CUDA_PLAIN_ROWS if a.activation == "none" and a.residual is None else CUDA_ROWS)


def too_few_rows(x: Tensor, minimum: int) -> list[str]:
    rows = x.shape[:-1].numel()
    return [f"{rows} rows do not fill the GPU: the CUDA kernel wins from {minimum} rows on"] if rows < minimum else []


def run_triton(a: Arguments) -> Tensor:
    out = a.x.new_empty(*_result_shape(a))
    if out.numel():
        kernels, inputs = triton.kernels("linear_act"), _kernel_inputs(a)

        def ours() -> None:
            kernels.forward(*inputs, out)

        ours()
        if not kernels.is_few(inputs[0], a.weight):
            kernels.AGAINST_TORCH.run(a.x.device, _race(a), ours, lambda: run_torch(a))
    return out


def train_triton(a: Arguments, buffers: list[Tensor]) -> Tensor:
    out = a.x.new_empty(*_result_shape(a))
    if out.numel():
        triton.kernels("linear_act").apply(*_kernel_inputs(a), out, *buffers)
    return out


def buffers_triton(a: Arguments) -> list[Tensor]:
    """For x @ weight.T + bias, which the gradient of an activation needs."""
    return [] if a.activation == "none" else [a.x.new_empty(*_result_shape(a))]


def backward_triton(grads: list[Tensor | None], a: Arguments, saved: list[Tensor], needs: list[bool]) -> list[Tensor]:
    x, weight, bias, activation, _ = a
    wants_x, wants_weight, wants_bias, wants_residual = needs
    outputs = weight.shape[0]
    grad = x.new_zeros(*_result_shape(a)) if grads[0] is None else grads[0].contiguous()
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


def _kernel_inputs(a: Arguments) -> tuple[Rows, Tensor, Tensor | None, Activation, Rows | None]:
    x, weight, residual = (t if t is None or cpu.dense(t) else t.contiguous() for t in (a.x, a.weight, a.residual))
    bias = None if a.bias is None else a.bias.contiguous()
    return rows_of(x), weight, bias, a.activation, None if residual is None else rows_of(residual)


def triton_reasons(a: Arguments) -> list[str]:
    return triton.reasons(a.x, weight=a.weight, bias=a.bias, residual=a.residual) + empty_reasons(a.weight)


def triton_slower_reasons(needs_grad: bool, a: Arguments) -> list[str]:
    """What holds for all sizes, and what tuning measured, for the forward alone.

    Few rows in 16 bits are not measured: kernels of 2 µs differ in a CUDA graph of many, not in one that is timed.
    """
    kernels = triton.kernels("linear_act")
    if not needs_grad and a.x.numel() and kernels.is_few(rows_of(a.x), a.weight):
        return []
    why = kernels.slower(a.x.dtype, a.activation, a.residual is not None)
    if a.x.dtype != torch.float32 and a.weight.shape[0] % ALIGNED:
        why = None  # cuBLAS is slow if rows of the result do not start at multiples of 16 bytes: measure
    if why is None and not needs_grad:
        why = kernels.AGAINST_TORCH.lost(a.x.device, _race(a))
    return [] if why is None else [why]


def _race(a: Arguments) -> tuple[Any, ...]:
    """What decides which way is faster; rows as the next power of two."""
    rows = 1 << (a.x.shape[:-1].numel() - 1).bit_length()
    return a.x.dtype, rows, *a.weight.shape, a.activation, a.bias is not None, a.residual is not None


def fake(a: Arguments) -> Tensor:
    dtype = a.x.dtype if a.residual is None else torch.promote_types(a.x.dtype, a.residual.dtype)
    return a.x.new_empty(*_result_shape(a), dtype=dtype)


SPEC = Spec(
    name="linear_act",
    arguments=Arguments,
    results=("(..., out_features)",),
    eager=run_torch,
    make_inputs=make_inputs,
    edge_cases=(
        {"rows": (1,), "inputs": 8, "outputs": 19},
        {"rows": (5,), "inputs": 33, "outputs": 70, "activation": "gelu", "residual": True},
        {"rows": (2, 3), "inputs": 1023, "outputs": 5, "activation": "quick_gelu", "bias": False},
        {"rows": (64,), "inputs": 64, "outputs": 48, "residual": True},
        {"rows": (65,), "inputs": 64, "outputs": 48, "activation": "quick_gelu", "residual": True},
        {"rows": (2, 5, 7), "inputs": 64, "outputs": 19, "activation": "gelu", "residual": True},
        {"rows": (2, 151), "inputs": 136, "outputs": 200, "activation": "gelu", "residual": True, "strided": True},
        {"rows": (257,), "inputs": 1, "outputs": 19, "residual": True},
        {"rows": (201,), "inputs": 530, "outputs": 37, "activation": "quick_gelu", "residual": True},
        {"rows": (128,), "inputs": 7, "outputs": 4115, "activation": "gelu", "bias": False},
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
    count_flops=lambda a: 2 * a.x.numel() * a.weight.shape[0],
    matrix_products=lambda a: [(2 * a.x.numel() * a.weight.shape[0], ["x"], ["weight"])],
    differentiable=("x", "weight", "bias", "residual"),
)

OP: Op[Tensor] = Op(
    SPEC,
    [
        Backend(
            "cpu",
            run_cpu,
            lambda a: onednn.not_supported_reasons(a.x, a.weight, a.bias, a.residual),
            devices=("cpu",),
        ),
        Backend("cuda", run_cuda, cuda_reasons, devices=cuda.DEVICES, slower_reasons=cuda_slower_reasons),
        Backend(
            "triton",
            run_triton,
            triton_reasons,
            devices=triton.DEVICES,
            backward=backward_triton,
            buffers=buffers_triton,
            train=train_triton,
            slower_reasons=triton_slower_reasons,
        ),
        Backend("torch", run_torch, differentiable=True),
    ],
    fake=fake,
    check=check,
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
        ValueError: mismatched shapes, or an unknown activation.
    """
    return OP(x, weight, bias, activation, residual)

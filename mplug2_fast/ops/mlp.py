"""Two linear layers with an activation between them, an optional layer norm before and an optional residual after."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops.layer_norm import (
    check_norm,
    norm_cpu,
    norm_reference,
    norm_torch,
    norm_triton,
    norm_triton_reasons,
)
from mplug2_fast.ops.linear_act import (
    CUDA_ROWS,
    EAGER,
    QUICK_GELU_SCALE,
    Activation,
    check_linear,
    is_native,
    run_native,
    too_few_rows,
)
from mplug2_fast.ops.linear_act import Arguments as LinearArguments
from mplug2_fast.ops.runtime import cpu, cuda, onednn, triton
from mplug2_fast.ops.runtime.backend import Backend
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.rows import rows as rows_of
from mplug2_fast.ops.runtime.spec import Product, Spec, normal

# Rows are processed in blocks. The hidden activations of a block fit in the last-level cache, and stay below the size
# from which the allocator maps fresh pages at every call (32 MiB in glibc).
_BLOCK_BYTES = 16 << 20


class Arguments(NamedTuple):
    x: Annotated[Tensor, "(..., channels)"]
    fc_weight: Annotated[Tensor, "(hidden, channels)"]
    fc_bias: Annotated[Tensor | None, "(hidden,)"]
    proj_weight: Annotated[Tensor, "(channels, hidden)"]
    proj_bias: Annotated[Tensor | None, "(channels,)"]
    activation: Activation
    norm_weight: Annotated[Tensor | None, "(channels,)"]
    norm_bias: Annotated[Tensor | None, "(channels,)"]
    eps: float
    residual: bool


def make_inputs(
    generator: torch.Generator,
    *,
    rows: tuple[int, ...],
    channels: int,
    hidden: int,
    activation: Activation = "quick_gelu",
    normed: bool = True,
    residual: bool = True,
    biases: bool = True,
    strided: bool = False,
) -> Arguments:
    return Arguments(
        x=normal(generator, *rows, channels * (1 + strided))[..., :channels],
        fc_weight=normal(generator, hidden, channels, scale=channels**-0.5),
        fc_bias=normal(generator, hidden) if biases else None,
        proj_weight=normal(generator, channels, hidden, scale=hidden**-0.5),
        proj_bias=normal(generator, channels) if biases else None,
        activation=activation,
        norm_weight=normal(generator, channels) if normed else None,
        norm_bias=normal(generator, channels) if normed and biases else None,
        eps=1e-5,
        residual=residual,
    )


def check(a: Arguments) -> None:
    check_linear(a.x, a.fc_weight, a.fc_bias, a.activation)
    expected = a.fc_weight.shape[::-1]
    if a.proj_weight.shape != expected:
        raise ValueError(f"proj_weight must have shape {tuple(expected)}, got {tuple(a.proj_weight.shape)}")
    if a.proj_bias is not None and a.proj_bias.shape != a.x.shape[-1:]:
        raise ValueError(f"proj_bias must have shape {tuple(a.x.shape[-1:])}, got {tuple(a.proj_bias.shape)}")
    if a.norm_weight is None and a.norm_bias is not None:
        raise ValueError("norm_bias is given without norm_weight: give both, or neither for no norm")
    check_norm(a.x, a.norm_weight, a.norm_bias)


def _composed(a: Arguments, norm: Any) -> Tensor:
    h = a.x if a.norm_weight is None else norm(a.x, a.norm_weight, a.norm_bias, a.eps)
    out = F.linear(EAGER[a.activation](F.linear(h, a.fc_weight, a.fc_bias)), a.proj_weight, a.proj_bias)
    return a.x + out if a.residual else out


def reference(a: Arguments) -> Tensor:
    """x + proj(activation(fc(layer_norm(x)))), operation by operation."""
    return _composed(a, norm_reference)


def run_torch(a: Arguments) -> Tensor:
    return _composed(a, norm_torch)


def run_cpu(a: Arguments) -> Tensor:
    if a.x.numel() == 0 or a.fc_weight.numel() == 0:  # nothing to multiply
        return run_torch(a).contiguous()
    rows = a.x.reshape(-1, a.x.shape[-1])
    by_row = a._replace(x=rows)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if is_native(rows, a.fc_weight, a.proj_weight):
        block = _native_block
    elif not onednn.multiplies(rows.dtype):
        return onednn.in_float32(run_cpu, by_row, out, by_row=("x",)).view(a.x.shape)
    else:
        fc_weight, proj_weight = (onednn.for_rows(weight, len(rows)) for weight in (a.fc_weight, a.proj_weight))
        a = a._replace(fc_weight=fc_weight, proj_weight=proj_weight)
        block = _quick_gelu_block if a.activation == "quick_gelu" else _block
    step = max(1, _BLOCK_BYTES // (a.fc_weight.shape[0] * rows.element_size()))
    for x, target in zip(rows.split(step), out.split(step), strict=True):
        block(a._replace(x=x), target)
    return out.view(a.x.shape)


def _native_block(a: Arguments, out: Tensor) -> None:
    h = run_native(LinearArguments(_norm(a), a.fc_weight, a.fc_bias, a.activation, None))
    run_native(LinearArguments(h, a.proj_weight, a.proj_bias, "none", a.x if a.residual else None), out)


def _block(a: Arguments, out: Tensor) -> None:
    h = onednn.linear(_norm(a), a.fc_weight, a.fc_bias, a.activation)
    residual = a.x.contiguous() if a.residual else None
    out.copy_(onednn.linear(h, a.proj_weight, a.proj_bias, residual=residual))


def _quick_gelu_block(a: Arguments, out: Tensor) -> None:
    """QuickGELU(z) = SiLU(1.702·z) / 1.702. The factor goes into the norm's parameters and into the biases, so no large
    tensor is rounded."""
    scale = QUICK_GELU_SCALE
    fc_bias, proj_bias, norm_weight, norm_bias = (
        None if t is None else t * scale for t in (a.fc_bias, a.proj_bias, a.norm_weight, a.norm_bias)
    )
    h = a.x * scale if norm_weight is None else _norm(a._replace(norm_weight=norm_weight, norm_bias=norm_bias))
    h = onednn.linear(onednn.linear(h, a.fc_weight, fc_bias, "swish"), a.proj_weight, proj_bias)
    if a.residual:
        torch.add(a.x, h, alpha=1 / scale, out=out)
    else:
        torch.mul(h, 1 / scale, out=out)


def _norm(a: Arguments) -> Tensor:
    if a.norm_weight is None:
        return a.x
    unsupported = cpu.reasons(a.x, weight=a.norm_weight, bias=a.norm_bias)
    return (norm_torch if unsupported else norm_cpu)(a.x, a.norm_weight, a.norm_bias, a.eps)


def cpu_reasons(a: Arguments) -> list[str]:
    return onednn.not_supported_reasons(*(value for value in a if isinstance(value, Tensor)))


def run_cuda(a: Arguments) -> Tensor:
    x = a.x
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        h = x if a.norm_weight is None else norm_triton(x, a.norm_weight, a.norm_bias, a.eps)
        hidden = x.new_empty(*x.shape[:-1], a.fc_weight.shape[0])
        cuda.linear_act(h, a.fc_weight, a.fc_bias, a.activation, None, hidden)
        cuda.linear_act(hidden, a.proj_weight, a.proj_bias, "none", x if a.residual else None, out)
    return out


def cuda_reasons(a: Arguments) -> list[str]:
    """Those of the two products, and those of the Triton kernel for the layer norm."""
    reasons = cuda.reasons(
        a.x, fc_weight=a.fc_weight, fc_bias=a.fc_bias, proj_weight=a.proj_weight, proj_bias=a.proj_bias
    )
    reasons = reasons or cuda.alignment_reasons(*a.fc_weight.shape)
    return reasons or ([] if a.norm_weight is None else norm_triton_reasons(a.x))


def run_triton(a: Arguments) -> Tensor:
    out = torch.empty_like(a.x, memory_format=torch.contiguous_format)
    if out.numel():
        kernels = triton.kernels("mlp")

        def ours() -> None:
            kernels.forward(*_kernel_inputs(a), out)

        ours()
        kernels.AGAINST_TORCH.run(a.x.device, _race(a), ours, lambda: run_torch(a))
    return out


def train_triton(a: Arguments, buffers: list[Tensor]) -> Tensor:
    out = torch.empty_like(a.x, memory_format=torch.contiguous_format)
    if out.numel():
        triton.kernels("mlp").forward(*_kernel_inputs(a), out, buffers[0].flatten(0, -2))
    return out


def buffers_triton(a: Arguments) -> list[Tensor]:
    """For the activation's input, from which the backward recomputes the hidden channels."""
    return [a.x.new_empty(*a.x.shape[:-1], a.fc_weight.shape[0])]


def backward_triton(grads: list[Tensor | None], a: Arguments, saved: list[Tensor], needs: list[bool]) -> list[Tensor]:
    wanted = {name: getattr(a, name) for name, need in zip(SPEC.differentiable, needs, strict=True) if need}
    if a.x.numel() == 0:
        return [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in wanted.values()]
    channels = a.x.shape[-1]
    grad = torch.zeros_like(a.x) if grads[0] is None else grads[0]
    _, *others = _kernel_inputs(a)
    made = triton.kernels("mlp").backward(
        grad.reshape(-1, channels).contiguous(),
        a.x.reshape(-1, channels).contiguous(),
        *others,
        saved[0].flatten(0, -2),
        set(wanted),
    )
    return [made[name].to(t.dtype).view(t.shape) for name, t in wanted.items()]


def _kernel_inputs(a: Arguments) -> tuple[Any, ...]:
    x, fc_weight, proj_weight = (t if cpu.dense(t) else t.contiguous() for t in (a.x, a.fc_weight, a.proj_weight))
    fc_bias, proj_bias, norm_weight, norm_bias = (
        None if t is None else t.contiguous() for t in (a.fc_bias, a.proj_bias, a.norm_weight, a.norm_bias)
    )
    inputs = Arguments(
        x, fc_weight, fc_bias, proj_weight, proj_bias, a.activation, norm_weight, norm_bias, a.eps, a.residual
    )
    return rows_of(x), *inputs[1:]


def triton_reasons(a: Arguments) -> list[str]:
    if a.norm_weight is not None and (reasons := norm_triton_reasons(a.x)):
        return reasons
    return triton.reasons(
        a.x, fc_weight=a.fc_weight, fc_bias=a.fc_bias, proj_weight=a.proj_weight, proj_bias=a.proj_bias
    )


def triton_slower_reasons(needs_grad: bool, a: Arguments) -> list[str]:
    """Fusing gains nothing for either product, or tuning measured so, for the forward alone."""
    kernels = triton.kernels("mlp")
    why = kernels.slower(a.x.dtype, a.activation, a.residual)
    if why is None and not needs_grad:
        why = kernels.AGAINST_TORCH.lost(a.x.device, _race(a))
    return [] if why is None else [why]


def _race(a: Arguments) -> tuple[Any, ...]:
    """What decides which way is faster; rows as the next power of two."""
    rows = 1 << (a.x.shape[:-1].numel() - 1).bit_length()
    kinds = (value is not None if value is None or isinstance(value, Tensor) else value for value in a[2:])
    return a.x.dtype, rows, *a.fc_weight.shape, *kinds


def products(a: Arguments) -> list[Product]:
    rows, normed = a.x.shape[:-1].numel(), ["x", "norm_weight", "norm_bias"]
    return [
        (2 * rows * a.fc_weight.numel(), normed, ["fc_weight"]),
        (2 * rows * a.proj_weight.numel(), [*normed, "fc_weight", "fc_bias"], ["proj_weight"]),
    ]


SPEC = Spec(
    name="mlp",
    arguments=Arguments,
    results=("(..., channels)",),
    eager=reference,
    make_inputs=make_inputs,
    edge_cases=(
        *(
            {"rows": (3, 7), "channels": 12, "hidden": 40, "activation": activation, "normed": normed, "residual": add}
            for activation in ("quick_gelu", "gelu", "none")
            for normed, add in ((True, True), (False, True), (False, False), (True, False))
        ),
        *(
            {"rows": (2, 35), "channels": 12, "hidden": 40, "activation": activation, "normed": normed, "residual": add}
            for activation, normed, add in (("quick_gelu", True, True), ("gelu", False, True), ("none", True, False))
        ),
        {"rows": (1,), "channels": 33, "hidden": 7},
        {"rows": (80,), "channels": 33, "hidden": 7, "strided": True},
        {"rows": (9, 9), "channels": 16, "hidden": 20, "strided": True, "activation": "gelu"},
        {"rows": (5, 3), "channels": 24, "hidden": 16, "biases": False},
        {"rows": (2, 71), "channels": 72, "hidden": 200},
        {"rows": (0,), "channels": 12, "hidden": 40},
    ),
    models={
        "base": {"rows": (1, 16, 197), "channels": 768, "hidden": 3072},
        "large": {"rows": (1, 16, 257), "channels": 1024, "hidden": 4096},
    },
    count_flops=lambda a: sum(flops for flops, *_ in products(a)),
    matrix_products=products,
    differentiable=("x", "fc_weight", "fc_bias", "proj_weight", "proj_bias", "norm_weight", "norm_bias"),
)

OP: Op[Tensor] = Op(
    SPEC,
    [
        Backend("cpu", run_cpu, cpu_reasons, devices=("cpu",)),
        Backend(
            "cuda",
            run_cuda,
            cuda_reasons,
            devices=cuda.DEVICES,
            slower_reasons=lambda needs_grad, a: too_few_rows(a.x, CUDA_ROWS),
        ),
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
    fake=lambda a: torch.empty_like(a.x, memory_format=torch.contiguous_format),
    check=check,
    autocast=True,
)


@OP.public
def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    activation: Activation,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: bool = True,
) -> Tensor:
    """`x + proj(activation(fc(layer_norm(x))))`.

    Args:
        x: `(..., channels)`. fc_weight: `(hidden, channels)`. proj_weight: `(channels, hidden)`. fc_bias: `(hidden,)`.
        proj_bias: `(channels,)`.
        activation: `"none"`, `"gelu"` (the erf form) or `"quick_gelu"` (x·sigmoid(1.702·x)).
        norm_weight, norm_bias: `(channels,)`. With norm_weight=None there is no layer norm.
        residual: whether x is added.

    Returns a new contiguous tensor of x's shape and dtype.

    Raises:
        ValueError: mismatched shapes, or an unknown activation.
    """
    return OP(x, fc_weight, fc_bias, proj_weight, proj_bias, activation, norm_weight, norm_bias, eps, residual)

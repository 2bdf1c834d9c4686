"""Two linear layers with an activation between them, a layer norm before and the residual after where asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops.layer_norm import check as check_norm
from mplug2_fast.ops.layer_norm import norm_native, norm_reference, norm_torch, norm_triton
from mplug2_fast.ops.layer_norm import triton_reasons as norm_reasons
from mplug2_fast.ops.linear_act import (
    CUDA_ROWS,
    EAGER,
    FEW_ROWS,
    QUICK_GELU_SCALE,
    Activation,
    few_rows,
    has_few_rows_kernel,
    too_few_rows,
)
from mplug2_fast.ops.linear_act import check as check_linear
from mplug2_fast.ops.runtime import cpu, cuda, onednn, triton
from mplug2_fast.ops.runtime.dispatch import Backend, Op
from mplug2_fast.ops.runtime.rows import rows as rows_of
from mplug2_fast.ops.runtime.spec import Product, Spec, normal
from mplug2_fast.ops.runtime.spec import upcast as in_float64

# Rows are taken in blocks whose hidden activations fit in the last-level cache and stay under the allocator's
# threshold for fresh pages (32 MiB in glibc), which would be faulted in again at every call.
_BLOCK_BYTES = 16 << 20


def reference(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    activation: Activation,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    residual: bool,
    *,
    upcast: bool = False,
) -> Tensor:
    """x + proj(activation(fc(layer_norm(x)))), operation by operation."""
    if upcast:
        x, fc_weight, fc_bias, proj_weight, proj_bias = in_float64(x, fc_weight, fc_bias, proj_weight, proj_bias)
        norm_weight, norm_bias = in_float64(norm_weight, norm_bias)
    h = x if norm_weight is None else norm_reference(x, norm_weight, norm_bias, eps)
    out = F.linear(EAGER[activation](F.linear(h, fc_weight, fc_bias)), proj_weight, proj_bias)
    return x + out if residual else out


def make(
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
) -> dict[str, Any]:
    return {
        "x": normal(generator, *rows, channels * (1 + strided))[..., :channels],
        "fc_weight": normal(generator, hidden, channels, scale=channels**-0.5),
        "fc_bias": normal(generator, hidden) if biases else None,
        "proj_weight": normal(generator, channels, hidden, scale=hidden**-0.5),
        "proj_bias": normal(generator, channels) if biases else None,
        "activation": activation,
        "norm_weight": normal(generator, channels) if normed else None,
        "norm_bias": normal(generator, channels) if normed and biases else None,
        "eps": 1e-5,
        "residual": residual,
    }


def run_torch(
    x, fc_weight, fc_bias, proj_weight, proj_bias, activation, norm_weight, norm_bias, eps, residual
) -> Tensor:
    h = x if norm_weight is None else norm_torch(x, norm_weight, norm_bias, eps)
    out = F.linear(EAGER[activation](F.linear(h, fc_weight, fc_bias)), proj_weight, proj_bias)
    return x + out if residual else out


def run_cpu(x, fc_weight, fc_bias, proj_weight, proj_bias, activation, norm_weight, norm_bias, eps, residual) -> Tensor:
    if x.numel() == 0 or fc_weight.numel() == 0:  # nothing to multiply
        return run_torch(
            x, fc_weight, fc_bias, proj_weight, proj_bias, activation, norm_weight, norm_bias, eps, residual
        ).contiguous()
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] <= FEW_ROWS and has_few_rows_kernel(x, fc_weight) and proj_weight.is_contiguous():
        h = rows if norm_weight is None else _norm(rows, norm_weight, norm_bias, eps)
        h = few_rows(h, fc_weight, fc_bias, activation, None)
        return few_rows(h, proj_weight, proj_bias, "none", rows if residual else None).view(x.shape)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if not onednn.multiplies(x.dtype):
        parameters = (fc_weight, fc_bias, proj_weight, proj_bias, activation, norm_weight, norm_bias, eps)
        return onednn.in_float32(run_cpu, out, (rows,), (*parameters, residual)).view(x.shape)
    fc_weight, proj_weight = (onednn.for_rows(weight, rows.shape[0]) for weight in (fc_weight, proj_weight))
    parameters = (fc_weight, fc_bias, proj_weight, proj_bias, activation, norm_weight, norm_bias, eps)
    step = max(1, _BLOCK_BYTES // (fc_weight.shape[0] * x.element_size()))
    block = _quick_gelu_block if activation == "quick_gelu" else _block
    for source, target in zip(rows.split(step), out.split(step), strict=True):
        block(source, target, *parameters, residual)
    return out.view(x.shape)


def _block(x, out, fc_weight, fc_bias, proj_weight, proj_bias, activation, norm_weight, norm_bias, eps, residual):
    h = x if norm_weight is None else _norm(x, norm_weight, norm_bias, eps)
    h = onednn.linear(h, fc_weight, fc_bias, activation)
    out.copy_(onednn.linear(h, proj_weight, proj_bias, residual=x.contiguous() if residual else None))


def _quick_gelu_block(x, out, fc_weight, fc_bias, proj_weight, proj_bias, _, norm_weight, norm_bias, eps, residual):
    """QuickGELU(z) = SiLU(1.702·z) / 1.702: the factor goes into the norm's affine part and the vectors around it,
    which rounds nothing that is large."""
    scale = QUICK_GELU_SCALE
    fc_bias, proj_bias = (None if bias is None else bias * scale for bias in (fc_bias, proj_bias))
    if norm_weight is None:
        h = x * scale
    else:
        h = _norm(x, norm_weight * scale, None if norm_bias is None else norm_bias * scale, eps)
    h = onednn.linear(onednn.linear(h, fc_weight, fc_bias, "swish"), proj_weight, proj_bias)
    if residual:
        torch.add(x, h, alpha=1 / scale, out=out)
    else:
        torch.mul(h, 1 / scale, out=out)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if cpu.reasons(x, weight=weight, bias=bias):
        return norm_torch(x, weight, bias, eps)
    return norm_native(x, weight, bias, eps)


def not_supported_reasons(x, fc_weight, fc_bias, proj_weight, proj_bias, activation, norm_weight, norm_bias, *_):
    return onednn.not_supported_reasons(x, fc_weight, fc_bias, proj_weight, proj_bias, norm_weight, norm_bias)


def run_cuda(
    x, fc_weight, fc_bias, proj_weight, proj_bias, activation, norm_weight, norm_bias, eps, residual
) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        h = x if norm_weight is None else norm_triton(x, norm_weight, norm_bias, eps)
        hidden = x.new_empty(*x.shape[:-1], fc_weight.shape[0])
        cuda.linear_act(h, fc_weight, fc_bias, activation, None, hidden)
        cuda.linear_act(hidden, proj_weight, proj_bias, "none", x if residual else None, out)
    return out


def cuda_reasons(x, fc_weight, fc_bias, proj_weight, proj_bias, activation, norm_weight, *_) -> list[str]:
    """Those of the two products, and those of the Triton kernel where there is a layer norm."""
    reasons = cuda.reasons(x, fc_weight=fc_weight, fc_bias=fc_bias, proj_weight=proj_weight, proj_bias=proj_bias)
    reasons = reasons or cuda.alignment_reasons(*fc_weight.shape)
    return reasons or ([] if norm_weight is None else norm_reasons(x))


def slower_than_others(needs_grad: bool, x, *_: Any) -> list[str]:
    return too_few_rows(x, CUDA_ROWS)


def run_triton(x: Tensor, *others: Any) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():

        def ours() -> None:
            triton.kernels("mlp").forward(*_kernel_arguments(x, *others), out)

        ours()
        triton.kernels("mlp").AGAINST_TORCH.run(x.device, _race(x, *others), ours, lambda: run_torch(x, *others))
    return out


def train_triton(x, *others_and_saved: Any) -> Tensor:
    *others, saved = others_and_saved
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        triton.kernels("mlp").forward(*_kernel_arguments(x, *others), out, saved[0].flatten(0, -2))
    return out


def saved_triton(x, fc_weight, *_) -> list[Tensor]:
    """What goes into the activation, from which the backward computes the hidden channels again."""
    return [x.new_empty(*x.shape[:-1], fc_weight.shape[0])]


def backward_triton(
    grads: list[Tensor | None], arguments: tuple[Any, ...], saved: list[Tensor], needs: list[bool]
) -> list[Tensor]:
    x, channels = arguments[0], arguments[0].shape[-1]
    tensors = dict(zip(SPEC.differentiable, (*arguments[:5], *arguments[6:8]), strict=True))
    wanted = [name for name, need in zip(tensors, needs, strict=True) if need]
    if x.numel() == 0:
        return [torch.zeros_like(tensors[name], memory_format=torch.contiguous_format) for name in wanted]
    grad = torch.zeros_like(x) if grads[0] is None else grads[0]
    _, *others = _kernel_arguments(x, *arguments[1:])
    made = triton.kernels("mlp").backward(
        grad.reshape(-1, channels).contiguous(),
        x.reshape(-1, channels).contiguous(),
        *others,
        saved[0].flatten(0, -2),
        set(wanted),
    )
    return [made[name].to(tensors[name].dtype).view(tensors[name].shape) for name in wanted]


def _kernel_arguments(
    x, fc_weight, fc_bias, proj_weight, proj_bias, activation, norm_weight, norm_bias, eps, residual
) -> tuple[Any, ...]:
    x, fc_weight, proj_weight = (t if cpu.dense(t) else t.contiguous() for t in (x, fc_weight, proj_weight))
    fc_bias, proj_bias, norm_weight, norm_bias = (
        None if t is None else t.contiguous() for t in (fc_bias, proj_bias, norm_weight, norm_bias)
    )
    return (
        rows_of(x), fc_weight, fc_bias, proj_weight, proj_bias, activation, norm_weight, norm_bias, eps, residual
    )  # fmt: skip


def triton_reasons(x, fc_weight, fc_bias, proj_weight, proj_bias, activation, norm_weight, *_) -> list[str]:
    if norm_weight is not None and (reasons := norm_reasons(x)):
        return reasons
    return triton.reasons(x, fc_weight=fc_weight, fc_bias=fc_bias, proj_weight=proj_weight, proj_bias=proj_bias)


def slower_reasons(needs_grad: bool, x, *others: Any) -> list[str]:
    """That neither product gains by being fused, or what tuning found, which timed the forward alone."""
    kernels, activation, residual = triton.kernels("mlp"), others[4], others[8]
    why = kernels.slower(x.dtype, activation, residual)
    if why is None and not needs_grad:
        why = kernels.AGAINST_TORCH.lost(x.device, _race(x, *others))
    return [] if why is None else [why]


def _race(x, fc_weight, *others: Any) -> tuple[Any, ...]:
    """What the faster way depends on; rows as the next power of two."""
    rows = 1 << (x.shape[:-1].numel() - 1).bit_length()
    kinds = (o is not None if o is None or isinstance(o, Tensor) else o for o in others)
    return x.dtype, rows, *fc_weight.shape, *kinds


def products(x: Tensor, fc_weight: Tensor, proj_weight: Tensor, **_: Any) -> list[Product]:
    rows, hidden = x.shape[:-1].numel(), ["x", "norm_weight", "norm_bias"]
    fc = (2 * rows * fc_weight.numel(), hidden, ["fc_weight"])
    return [fc, (2 * rows * proj_weight.numel(), [*hidden, "fc_weight", "fc_bias"], ["proj_weight"])]


def flops(x: Tensor, fc_weight: Tensor, proj_weight: Tensor, **_: Any) -> int:
    return sum(flops for flops, *_ in products(x, fc_weight, proj_weight))


def check(
    x, fc_weight, fc_bias, proj_weight, proj_bias, activation, norm_weight, norm_bias, eps, residual
) -> None:  # fmt: skip
    check_linear(x, fc_weight, fc_bias, activation)
    if proj_weight.shape != fc_weight.shape[::-1]:
        raise ValueError(f"proj_weight must have shape {tuple(fc_weight.shape[::-1])}, got {tuple(proj_weight.shape)}")
    if proj_bias is not None and proj_bias.shape != x.shape[-1:]:
        raise ValueError(f"proj_bias must have shape {tuple(x.shape[-1:])}, got {tuple(proj_bias.shape)}")
    if norm_weight is None and norm_bias is not None:
        raise ValueError("norm_bias is given without a norm_weight: give both, or neither for no norm")
    check_norm(x, None, norm_weight, norm_bias)


SPEC = Spec(
    name="mlp",
    axes={
        "x": "(..., channels)",
        "fc_weight": "(hidden, channels)",
        "fc_bias": "(hidden,)",
        "proj_weight": "(channels, hidden)",
        "proj_bias": "(channels,)",
        "norm_weight": "(channels,)",
        "norm_bias": "(channels,)",
        "result": "(..., channels)",
    },
    reference=reference,
    make=make,
    awkward=(
        *(
            {"rows": rows, "channels": 12, "hidden": 40, "activation": activation, "normed": normed, "residual": add}
            for rows in ((3, 7), (2, 35))
            for activation in ("quick_gelu", "gelu", "none")
            for normed, add in ((True, True), (False, True), (False, False), (True, False))
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
    flops=flops,
    products=products,
    differentiable=("x", "fc_weight", "fc_bias", "proj_weight", "proj_bias", "norm_weight", "norm_bias"),
)

OP = Op(
    SPEC,
    "(Tensor x, Tensor fc_weight, Tensor? fc_bias, Tensor proj_weight, Tensor? proj_bias, str activation, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps, bool residual) -> Tensor",
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
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
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
        norm_weight, norm_bias: `(channels,)`; a norm_weight of None leaves the layer norm out.
        residual: False leaves the addition of x out.

    Returns a new contiguous tensor of x's shape and dtype.

    Raises:
        ValueError: shapes that do not go together, or an unknown activation.
    """
    return (  # type: ignore[return-value]
        x, fc_weight, fc_bias, proj_weight, proj_bias, activation, norm_weight, norm_bias, eps, residual
    )  # fmt: skip

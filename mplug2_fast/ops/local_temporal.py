"""mPLUG-2's local temporal module, the only part of its vision encoder that sees the order of frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops.layer_norm import MAX_CHANNELS, norm_backward_triton, norm_cpu, norm_torch, norm_triton
from mplug2_fast.ops.linear_act import EAGER, Activation, check_activation
from mplug2_fast.ops.linear_act import OP as LINEAR
from mplug2_fast.ops.runtime import cpu, onednn, triton
from mplug2_fast.ops.runtime.backend import Backend
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.rows import rows as rows_of
from mplug2_fast.ops.runtime.spec import Product, Spec, normal

MAX_FRAMES = 128
"""Most frames of the Triton kernel."""
MANY_ROWS = 4096
"""Minimum rows for separate passes to win on a GPU over the norm and the convolution fused into the products: plain
products load rows straight into the tensor cores."""


class Arguments(NamedTuple):
    x: Annotated[Tensor, "(batch, frames, 1 + patches, channels), without the 1 if class_token is False"]
    norm_weight: Annotated[Tensor | None, "(channels,)"]
    norm_bias: Annotated[Tensor | None, "(channels,)"]
    down_weight: Annotated[Tensor, "(inner, channels)"]
    down_bias: Annotated[Tensor | None, "(inner,)"]
    conv_weight: Annotated[Tensor, "(inner, kernel)"]
    conv_bias: Annotated[Tensor | None, "(inner,)"]
    up_weight: Annotated[Tensor, "(channels, inner)"]
    up_bias: Annotated[Tensor | None, "(channels,)"]
    eps: float
    activation: Activation
    class_token: bool
    residual: bool

    @property
    def norm(self) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
        return self.x, self.norm_weight, self.norm_bias, self.eps


def make_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    frames: int,
    patches: int,
    channels: int,
    inner: int,
    kernel: int = 3,
    strided: bool = False,
    normed: bool = True,
    biases: bool = True,
    activation: Activation = "quick_gelu",
    class_token: bool = True,
    residual: bool = True,
) -> Arguments:
    def vector(size: int, given: bool = biases) -> Tensor | None:
        return normal(generator, size) if given else None

    return Arguments(
        x=normal(generator, batch, frames, class_token + patches, channels * (1 + strided))[..., :channels],
        norm_weight=vector(channels, normed),
        norm_bias=vector(channels, normed and biases),
        down_weight=normal(generator, inner, channels, scale=channels**-0.5),
        down_bias=vector(inner),
        conv_weight=normal(generator, inner, kernel),
        conv_bias=vector(inner),
        up_weight=normal(generator, channels, inner, scale=inner**-0.5),
        up_bias=vector(channels),
        eps=1e-5,
        activation=activation,
        class_token=class_token,
        residual=residual,
    )


def check(a: Arguments) -> None:
    if a.x.dim() != 4 or a.x.shape[2] < int(a.class_token):
        shape = "(batch, frames, 1 + patches, channels)" if a.class_token else "(batch, frames, patches, channels)"
        raise ValueError(f"x must be {shape}, got {tuple(a.x.shape)}")
    check_activation(a.activation)
    if a.norm_weight is None and a.norm_bias is not None:
        raise ValueError("norm_bias is given without norm_weight: give both, or neither for no norm")
    if a.conv_weight.dim() != 2:
        raise ValueError(f"conv_weight must be (inner, kernel), got {tuple(a.conv_weight.shape)}")
    channels, (inner, kernel) = a.x.shape[-1], a.conv_weight.shape
    shapes = ((channels,), (channels,), (inner, channels), (inner,), (inner, kernel), (inner,), (channels, inner))
    for name, shape in zip(SPEC.differentiable[1:], (*shapes, (channels,)), strict=True):
        parameter = getattr(a, name)
        if parameter is not None and parameter.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(parameter.shape)}")
    if kernel % 2 == 0:
        raise ValueError(f"conv_weight must have an odd number of frames, got {kernel}")


def reference(a: Arguments) -> Tensor:
    """The official form: patches only, a Conv3d over `(channels, frames, height, width)`."""
    patches = a.x[:, :, 1:] if a.class_token else a.x
    h = patches
    if a.norm_weight is not None:
        h = F.layer_norm(h, a.x.shape[-1:], a.norm_weight, a.norm_bias, a.eps)
    h = F.linear(h, a.down_weight, a.down_bias).permute(0, 3, 1, 2)[..., None]
    padding = (a.conv_weight.shape[1] // 2, 0, 0)
    h = F.conv3d(h, a.conv_weight[:, None, :, None, None], a.conv_bias, padding=padding, groups=h.shape[1])
    h = h[..., 0].permute(0, 2, 3, 1)
    h = F.linear(EAGER[a.activation](h), a.up_weight, a.up_bias)
    out = patches + h if a.residual else h
    return torch.cat([a.x[:, :, :1], out], dim=2) if a.class_token else out


def temporal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution over frames with zero padding, as shifted multiply-adds.

    Args:
        x: `(batch, frames, tokens, channels)`. weight: `(channels, kernel)`, kernel odd. bias: `(channels,)`, or None.

    Returns a new tensor of x's shape in float32, because the activation comes before rounding.
    """
    kernel, frames = weight.shape[1], x.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, taps = x.to(dtype), weight.to(dtype).t().contiguous()
    out = x * taps[kernel // 2] if bias is None else torch.addcmul(bias.to(dtype), x, taps[kernel // 2])
    for tap in range(kernel):
        shift = tap - kernel // 2  # out[t] reads x[t + shift]
        if shift == 0 or abs(shift) >= frames:
            continue
        low, high = max(0, -shift), frames - max(0, shift)
        out[:, low:high].addcmul_(x[:, low + shift : high + shift], taps[tap])
    return out


def run_torch(a: Arguments) -> Tensor:
    # The class tokens go through the products too, 1 row in 257, which saves a strided copy of the patches.
    h = a.x if a.norm_weight is None else norm_torch(*a.norm)
    h = temporal_conv(F.linear(h, a.down_weight, a.down_bias), a.conv_weight, a.conv_bias)
    out = F.linear(EAGER[a.activation](h).to(a.x.dtype), a.up_weight, a.up_bias)
    return _keep_class_token(a, (a.x + out if a.residual else out).contiguous())


def temporal_conv_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """The activation of `temporal_conv`, in x's dtype."""
    if x.device.type == "cpu" and not cpu.reasons(x) and x.numel():
        return _native_conv(x, weight, bias, activation)
    return EAGER[activation](temporal_conv(x, weight, bias)).to(x.dtype)


def _keep_class_token(a: Arguments, out: Tensor) -> Tensor:
    if a.class_token:
        out[:, :, 0] = a.x[:, :, 0]
    return out


def run_cpu(a: Arguments) -> Tensor:
    if a.x.numel() == 0 or a.down_weight.numel() == 0:  # nothing to multiply
        return run_torch(a)
    norm_weight, norm_bias = (None if t is None else t.contiguous() for t in (a.norm_weight, a.norm_bias))
    a = a._replace(x=a.x.contiguous(), norm_weight=norm_weight, norm_bias=norm_bias)
    if not onednn.multiplies(a.x.dtype):
        return onednn.in_float32(run_cpu, a, torch.empty_like(a.x), by_row=("x",), block=1)  # one video at a time
    h = a.x if a.norm_weight is None else norm_cpu(*a.norm)
    h = _native_conv(onednn.linear(h, a.down_weight, a.down_bias), a.conv_weight, a.conv_bias, a.activation)
    out = onednn.linear(h, a.up_weight, a.up_bias, residual=a.x if a.residual else None)
    return _keep_class_token(a, out)


def _native_conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """The activation of the temporal convolution."""
    out = torch.empty_like(x)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    weight, bias = weight.float().t().contiguous(), bias.float().contiguous()
    cpu.module().temporal_conv(
        cpu.isa(),
        x.dtype == torch.bfloat16,
        cpu.threads(x.numel()),
        tuple(x.shape),
        weight.shape[0],
        x.data_ptr(),
        x.stride()[:3],
        weight.data_ptr(),
        bias.data_ptr(),
        cpu.activation(activation),
        out.data_ptr(),
    )
    return out


def cpu_reasons(a: Arguments) -> list[str]:
    parameters = (value for value in a[1:] if isinstance(value, Tensor))
    return cpu.reasons(a.x) + onednn.not_supported_reasons(a.x, *parameters)


def run_triton(a: Arguments, buffers: Sequence[Tensor] = ()) -> Tensor:
    """`buffers`: the tensor for the first product's result, `(batch, frames, tokens, inner)`, in training."""
    x = a.x if cpu.dense(a.x) else a.x.contiguous()
    a = Arguments(x, *(value.contiguous() if isinstance(value, Tensor) else value for value in a[1:]))
    h = buffers[0] if buffers else None
    if in_passes(x):
        return _run_passes(a, h)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        triton.kernels("local_temporal").forward(*a, out, h)
    return out


def in_passes(x: Tensor) -> bool:
    return x.dtype != torch.float32 and x.numel() >= MANY_ROWS * x.shape[-1]


def _run_passes(a: Arguments, h: Tensor | None) -> Tensor:
    """One pass each for the norm, the first product, the convolution with its activation, and the second product with
    the residual."""
    normed = a.x if a.norm_weight is None else norm_triton(*a.norm)
    if h is None:
        h = LINEAR.run(normed, a.down_weight, a.down_bias, "none", None)
    else:
        triton.kernels("linear_act").apply(rows_of(normed), a.down_weight, a.down_bias, "none", None, h)
    activated = torch.empty_like(h)
    triton.kernels("local_temporal").convolve(h, a.conv_weight, a.conv_bias, a.activation, a.class_token, activated)
    out = LINEAR.run(activated, a.up_weight, a.up_bias, "none", a.x if a.residual else None)
    return _keep_class_token(a, out)


def buffers_triton(a: Arguments) -> list[Tensor]:
    """For the first product's result, which saves the backward a product."""
    return [a.x.new_empty(*a.x.shape[:-1], a.down_weight.shape[0])]


def backward_triton(grads: list[Tensor | None], a: Arguments, saved: list[Tensor], needs: list[bool]) -> list[Tensor]:
    """Each product covers all rows and runs in cuBLAS. The rows of class tokens are zero."""
    wants = dict(zip(SPEC.differentiable, needs, strict=True))
    x, (grad,), (h,) = a.x, grads, saved
    if grad is None or x.numel() == 0:
        needed = (getattr(a, name) for name, needs_it in wants.items() if needs_it)
        return [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in needed]
    grad = grad.contiguous()
    rows = x.numel() // x.shape[-1]
    by_row = grad.view(rows, -1)
    da = torch.mm(by_row, a.up_weight).view(*x.shape[:-1], -1)
    activated, dh = torch.empty_like(da), torch.empty_like(da)
    taps, bias = a.conv_weight.contiguous(), None if a.conv_bias is None else a.conv_bias.contiguous()
    sums = triton.kernels("local_temporal").backward(h, da, taps, bias, a.activation, a.class_token, activated, dh)
    activated, dh = activated.view(rows, -1), dh.view(rows, -1)

    found = {}
    if wants["x"] or wants["norm_weight"] or wants["norm_bias"]:
        if a.norm_weight is None:
            product = torch.addmm(by_row, dh, a.down_weight) if a.residual else torch.mm(dh, a.down_weight)
            found["x"] = product.view(x.shape)
        else:
            normed = [name for name in ("x", "norm_weight", "norm_bias") if wants[name]]
            dnormed = torch.mm(dh, a.down_weight).view(x.shape)
            of_norm = [dnormed, grad if a.residual else None]
            gradients = norm_backward_triton(of_norm, x, None, a.norm_weight, a.norm_bias, a.eps, needs[:3])
            found.update(zip(normed, gradients, strict=True))
        if wants["x"] and a.class_token and not a.residual:
            found["x"][:, :, 0] = grad[:, :, 0]
    if wants["down_weight"]:
        normed = x if a.norm_weight is None else norm_triton(*a.norm)
        found["down_weight"] = torch.mm(dh.t(), normed.reshape(rows, -1))
    if wants["down_bias"]:
        found["down_bias"] = sums[-1].to(a.down_bias.dtype)
    if wants["conv_weight"]:
        found["conv_weight"] = sums[:-2].t().to(a.conv_weight.dtype, memory_format=torch.contiguous_format)
    if wants["conv_bias"]:
        found["conv_bias"] = sums[-2].to(a.conv_bias.dtype)
    if wants["up_weight"]:
        found["up_weight"] = torch.mm(by_row.t(), activated)
    if wants["up_bias"]:
        patches = grad[:, :, 1:] if a.class_token else grad
        found["up_bias"] = patches.sum(dim=(0, 1, 2), dtype=torch.float32).to(a.up_bias.dtype)
    return [found[name] for name, needs_it in wants.items() if needs_it]


def triton_reasons(a: Arguments) -> list[str]:
    reasons = triton.reasons(a.x, down_weight=a.down_weight, up_weight=a.up_weight)
    if a.x.shape[1] > MAX_FRAMES:
        reasons.append(f"the Triton kernel supports up to {MAX_FRAMES} frames, got {a.x.shape[1]}")
    if a.norm_weight is not None and a.x.shape[-1] > MAX_CHANNELS:
        reasons.append(f"the Triton kernel of the norm supports up to {MAX_CHANNELS} channels, got {a.x.shape[-1]}")
    return reasons


def _patch_rows(a: Arguments) -> int:
    return a.x.shape[0] * a.x.shape[1] * (a.x.shape[2] - int(a.class_token))


def products(a: Arguments) -> list[Product]:
    rows, normed = _patch_rows(a), ["x", "norm_weight", "norm_bias"]
    down = [*normed, "down_weight", "down_bias"]
    return [
        (2 * rows * a.down_weight.numel(), normed, ["down_weight"]),
        (2 * rows * a.conv_weight.numel(), down, ["conv_weight"]),
        (2 * rows * a.down_weight.numel(), [*down, "conv_weight", "conv_bias"], ["up_weight"]),
    ]


_PLAIN = {"normed": False, "biases": False, "class_token": False, "residual": False, "activation": "none"}

SPEC = Spec(
    name="local_temporal",
    arguments=Arguments,
    results=("the shape of x",),
    eager=reference,
    make_inputs=make_inputs,
    edge_cases=(
        {"batch": 2, "frames": 4, "patches": 9, "channels": 16, "inner": 8},
        {"batch": 1, "frames": 3, "patches": 5, "channels": 16, "inner": 8, **_PLAIN},
        {"batch": 1, "frames": 2, "patches": 3, "channels": 12, "inner": 3, "kernel": 5},
        {"batch": 2, "frames": 7, "patches": 1, "channels": 8, "inner": 4, "kernel": 7, "activation": "gelu"},
        {"batch": 1, "frames": 1, "patches": 5, "channels": 16, "inner": 8},
        {"batch": 1, "frames": 3, "patches": 40, "channels": 8, "inner": 8, "kernel": 1},
        {"batch": 2, "frames": 5, "patches": 17, "channels": 48, "inner": 37},
        {"batch": 2, "frames": 3, "patches": 18, "channels": 128, "inner": 128, "kernel": 5},
        {"batch": 1, "frames": 3, "patches": 4, "channels": 32, "inner": 16, "kernel": 9, "strided": True},
        {"batch": 0, "frames": 4, "patches": 9, "channels": 16, "inner": 8},
        {"batch": 2, "frames": 3, "patches": 6, "channels": 24, "inner": 16, "normed": False, "activation": "none"},
        {"batch": 2, "frames": 3, "patches": 6, "channels": 24, "inner": 16, "biases": False, "activation": "gelu"},
        {"batch": 3, "frames": 2, "patches": 7, "channels": 16, "inner": 24, "class_token": False},
        {"batch": 2, "frames": 4, "patches": 5, "channels": 16, "inner": 8, "residual": False, "normed": False},
        {"batch": 2, "frames": 4, "patches": 5, "channels": 16, "inner": 8, "residual": False, "strided": True},
    ),
    models={
        "base": {"batch": 1, "frames": 16, "patches": 196, "channels": 768, "inner": 384},
        "large": {"batch": 1, "frames": 16, "patches": 256, "channels": 1024, "inner": 512},
        "large, 112 px": {"batch": 1, "frames": 16, "patches": 64, "channels": 1024, "inner": 512},
    },
    count_flops=lambda a: sum(flops for flops, *_ in products(a)),
    matrix_products=products,
    differentiable=Arguments._fields[:9],
)

OP: Op[Tensor] = Op(
    SPEC,
    [
        Backend("cpu", run_cpu, cpu_reasons, devices=("cpu",)),
        Backend(
            "triton",
            run_triton,
            triton_reasons,
            devices=triton.DEVICES,
            backward=backward_triton,
            buffers=buffers_triton,
            train=run_triton,
        ),
        Backend("torch", run_torch, differentiable=True),
    ],
    fake=lambda a: torch.empty_like(a.x, memory_format=torch.contiguous_format),
    check=check,
    autocast=True,
)


@OP.public
def local_temporal(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    activation: Activation = "quick_gelu",
    class_token: bool = True,
    residual: bool = True,
) -> Tensor:
    """patches + up(activation(conv over time(down(layer_norm(patches))))). The class token passes through unchanged.

    Args:
        x: `(batch, frames, 1 + patches, channels)`.
        norm_weight, norm_bias, up_bias: `(channels,)`. down_bias, conv_bias: `(inner,)`.
        down_weight: `(inner, channels)`. conv_weight: `(inner, kernel)`, kernel odd. up_weight: `(channels, inner)`.
            With norm_weight=None there is no layer norm. Each bias may be None.
        activation: `"quick_gelu"` (x·sigmoid(1.702·x)), `"gelu"` (the erf form) or `"none"`.
        class_token: whether x has class tokens. If not, x is `(batch, frames, patches, channels)`.
        residual: whether the patches are added.

    Returns a new contiguous tensor of x's shape and dtype. Source: mPLUG-2 (arXiv 2302.00402), section 3.2; official
    name `lmhra`. UniFormerV2's local MHRA, ST-Adapter and mPLUG-Owl-video's local temporal module are the same operator
    with other arguments.

    Raises:
        ValueError: mismatched shapes, an even kernel, an unknown activation, or norm_bias without norm_weight.
    """
    return OP(
        x, norm_weight, norm_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias,
        eps, activation, class_token, residual,
    )  # fmt: skip

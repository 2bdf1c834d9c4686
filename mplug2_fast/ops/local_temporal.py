"""The local temporal module: the only part of mPLUG-2's vision encoder that sees the order of frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops.layer_norm import MAX_CHANNELS, norm_backward_triton, norm_native, norm_torch, norm_triton
from mplug2_fast.ops.linear_act import EAGER, Activation, check_activation
from mplug2_fast.ops.linear_act import OP as LINEAR_ACT
from mplug2_fast.ops.runtime import cpu, onednn, triton
from mplug2_fast.ops.runtime.dispatch import Backend, Op
from mplug2_fast.ops.runtime.rows import rows as rows_of
from mplug2_fast.ops.runtime.spec import Product, Spec, normal
from mplug2_fast.ops.runtime.spec import upcast as in_float64

MAX_FRAMES = 128
"""Of the Triton kernel."""
MANY_ROWS = 4096
"""From so many on, products of their own and passes between them are faster on a GPU than the norm and the convolution
within the products: rows go to the tensor cores as they lie in memory."""


def reference(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    eps: float,
    activation: Activation,
    class_token: bool,
    residual: bool,
    *,
    upcast: bool = False,
) -> Tensor:
    """The released form: patches only, a Conv3d over (channels, frames, height, width)."""
    if upcast:
        x, norm_weight, norm_bias, down_weight, down_bias = in_float64(
            x, norm_weight, norm_bias, down_weight, down_bias
        )
        conv_weight, conv_bias, up_weight, up_bias = in_float64(conv_weight, conv_bias, up_weight, up_bias)
    patches = x[:, :, 1:] if class_token else x
    h = patches
    if norm_weight is not None:
        h = F.layer_norm(h, x.shape[-1:], norm_weight, norm_bias, eps)
    h = F.linear(h, down_weight, down_bias).permute(0, 3, 1, 2)[..., None]
    padding = (conv_weight.shape[1] // 2, 0, 0)
    h = F.conv3d(h, conv_weight[:, None, :, None, None], conv_bias, padding=padding, groups=h.shape[1])
    h = h[..., 0].permute(0, 2, 3, 1)
    h = F.linear(EAGER[activation](h), up_weight, up_bias)
    out = patches + h if residual else h
    return torch.cat([x[:, :, :1], out], dim=2) if class_token else out


def make(
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
) -> dict[str, Any]:
    def bias(size: int, there: bool = biases) -> Tensor | None:
        return normal(generator, size) if there else None

    return {
        "x": normal(generator, batch, frames, class_token + patches, channels * (1 + strided))[..., :channels],
        "norm_weight": bias(channels, normed),
        "norm_bias": bias(channels, normed and biases),
        "down_weight": normal(generator, inner, channels, scale=channels**-0.5),
        "down_bias": bias(inner),
        "conv_weight": normal(generator, inner, kernel),
        "conv_bias": bias(inner),
        "up_weight": normal(generator, channels, inner, scale=inner**-0.5),
        "up_bias": bias(channels),
        "eps": 1e-5,
        "activation": activation,
        "class_token": class_token,
        "residual": residual,
    }


def temporal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution over frames with zero padding, as shifted multiply-adds.

    Args:
        x: `(batch, frames, tokens, channels)`. weight: `(channels, kernel)`, kernel odd. bias: `(channels,)`, or None.

    Returns a new tensor of x's shape, accumulated in float32 and left so: the activation comes before rounding.
    """
    kernel, frames = weight.shape[1], x.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, taps = x.to(dtype), weight.to(dtype).t().contiguous()
    out = x * taps[kernel // 2] if bias is None else torch.addcmul(bias.to(dtype), x, taps[kernel // 2])
    for tap in range(kernel):
        shift = tap - kernel // 2  # out[t] takes x[t + shift]
        if shift == 0 or abs(shift) >= frames:
            continue
        low, high = max(0, -shift), frames - max(0, shift)
        out[:, low:high].addcmul_(x[:, low + shift : high + shift], taps[tap])
    return out


def run_torch(
    x, norm_weight, norm_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias, eps, activation,
    class_token, residual,
) -> Tensor:  # fmt: skip
    # The class tokens go through the products as well (1 row in 257) so that no strided copy of the patches is made.
    h = x if norm_weight is None else norm_torch(x, norm_weight, norm_bias, eps)
    h = temporal_conv(F.linear(h, down_weight, down_bias), conv_weight, conv_bias)
    out = F.linear(EAGER[activation](h).to(x.dtype), up_weight, up_bias)
    out = (x + out if residual else out).contiguous()
    if class_token:
        out[:, :, 0] = x[:, :, 0]
    return out


def run_cpu(
    x, norm_weight, norm_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias, eps, activation,
    class_token, residual,
) -> Tensor:  # fmt: skip
    if x.numel() == 0 or down_weight.numel() == 0:  # nothing to multiply
        return run_torch(
            x, norm_weight, norm_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias, eps,
            activation, class_token, residual,
        )  # fmt: skip
    x = x.contiguous()
    if not onednn.multiplies(x.dtype):
        others = (
            norm_weight, norm_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias, eps, activation,
            class_token, residual,
        )  # fmt: skip
        return onednn.in_float32(run_cpu, torch.empty_like(x), (x,), others, block=1)  # a video at a time
    norm_weight, norm_bias = (None if t is None else t.contiguous() for t in (norm_weight, norm_bias))
    h = x if norm_weight is None else norm_native(x, norm_weight, norm_bias, eps)
    h = _native_conv(onednn.linear(h, down_weight, down_bias), conv_weight, conv_bias, activation)
    out = onednn.linear(h, up_weight, up_bias, residual=x if residual else None)
    if class_token:
        out[:, :, 0] = x[:, :, 0]
    return out


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


def not_supported_reasons(x, *others) -> list[str]:
    parameters = [other for other in others if isinstance(other, Tensor)]
    return [*cpu.reasons(x), *onednn.not_supported_reasons(x, *parameters)]


def run_triton(x, *others, h: Tensor | None = None) -> Tensor:
    x = x if cpu.dense(x) else x.contiguous()
    others = [other.contiguous() if isinstance(other, Tensor) else other for other in others]
    if in_passes(x):
        return run_passes(x, *others, h=h)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        triton.kernels("local_temporal").forward(x, *others, out, h)
    return out


def in_passes(x: Tensor) -> bool:
    return x.dtype != torch.float32 and x.numel() >= MANY_ROWS * x.shape[-1]


def run_passes(
    x, norm_weight, norm_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias, eps, activation,
    class_token, residual, h: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `run_torch`, in one pass each: the norm, the product, convolution and activation, and the other product with
    the residual. h: where the first product's result is kept, `(batch, frames, tokens, inner)`."""
    normed = x if norm_weight is None else norm_triton(x, norm_weight, norm_bias, eps)
    if h is None:
        down = (normed, down_weight, down_bias, "none", None)
        h = LINEAR_ACT.choose(down).run(*down)
    else:
        triton.kernels("linear_act").apply(rows_of(normed), down_weight, down_bias, "none", None, h)
    a = torch.empty_like(h)
    triton.kernels("local_temporal").convolve(h, conv_weight, conv_bias, activation, class_token, a)
    up = (a, up_weight, up_bias, "none", x if residual else None)
    out = LINEAR_ACT.choose(up).run(*up)
    if class_token:
        out[:, :, 0] = x[:, :, 0]
    return out


def saved_triton(x, norm_weight, norm_bias, down_weight, *_) -> list[Tensor]:
    """The down-projection's result, without which backward would have to multiply once more."""
    return [x.new_empty(*x.shape[:-1], down_weight.shape[0])]


def backward_triton(grads, arguments, saved, needs) -> list[Tensor]:
    """Every product is one of all rows, by cuBLAS; those of class tokens are zero."""
    (
        x, norm_weight, norm_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias, eps, activation,
        class_token, residual,
    ) = arguments  # fmt: skip
    wants = dict(zip(SPEC.differentiable, needs, strict=True))
    (grad,), (h,) = grads, saved
    if grad is None or x.numel() == 0:
        named = zip(SPEC.differentiable, arguments, strict=False)
        return [torch.zeros_like(t, memory_format=torch.contiguous_format) for name, t in named if wants[name]]
    grad = grad.contiguous()
    rows = x.numel() // x.shape[-1]
    by_row = grad.view(rows, -1)
    da = torch.mm(by_row, up_weight).view(*x.shape[:-1], -1)
    a, dh = torch.empty_like(da), torch.empty_like(da)
    taps, bias = conv_weight.contiguous(), None if conv_bias is None else conv_bias.contiguous()
    sums = triton.kernels("local_temporal").backward(h, da, taps, bias, activation, class_token, a, dh)
    a, dh = a.view(rows, -1), dh.view(rows, -1)

    found = {}
    if wants["x"] or wants["norm_weight"] or wants["norm_bias"]:
        if norm_weight is None:
            product = torch.addmm(by_row, dh, down_weight) if residual else torch.mm(dh, down_weight)
            found["x"] = product.view(x.shape)
        else:
            normed = [name for name in ("x", "norm_weight", "norm_bias") if wants[name]]
            dnormed = torch.mm(dh, down_weight).view(x.shape)
            gradients = norm_backward_triton(
                [dnormed, grad if residual else None], x, None, norm_weight, norm_bias, eps, needs[:3]
            )
            found.update(zip(normed, gradients, strict=True))
        if wants["x"] and class_token and not residual:
            found["x"][:, :, 0] = grad[:, :, 0]
    if wants["down_weight"]:
        normed = x if norm_weight is None else norm_triton(x, norm_weight, norm_bias, eps)
        found["down_weight"] = torch.mm(dh.t(), normed.reshape(rows, -1))
    if wants["down_bias"]:
        found["down_bias"] = sums[-1].to(down_bias.dtype)
    if wants["conv_weight"]:
        found["conv_weight"] = sums[:-2].t().to(conv_weight.dtype, memory_format=torch.contiguous_format)
    if wants["conv_bias"]:
        found["conv_bias"] = sums[-2].to(conv_bias.dtype)
    if wants["up_weight"]:
        found["up_weight"] = torch.mm(by_row.t(), a)
    if wants["up_bias"]:
        patches = grad[:, :, 1:] if class_token else grad
        found["up_bias"] = patches.sum(dim=(0, 1, 2), dtype=torch.float32).to(up_bias.dtype)
    return [found[name] for name in SPEC.differentiable if wants[name]]


def triton_reasons(x, norm_weight, norm_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, *_):
    reasons = triton.reasons(x, down_weight=down_weight, up_weight=up_weight)
    if x.shape[1] > MAX_FRAMES:
        reasons.append(f"a tile of the Triton kernel has all frames, up to {MAX_FRAMES}, not {x.shape[1]}")
    if norm_weight is not None and x.shape[-1] > MAX_CHANNELS:
        reasons.append(f"the norm's Triton kernel takes up to {MAX_CHANNELS} channels, not {x.shape[-1]}")
    return reasons


def flops(x: Tensor, down_weight: Tensor, conv_weight: Tensor, class_token: bool, **_: Any) -> int:
    positions = x.shape[0] * x.shape[1] * (x.shape[2] - class_token)
    return 2 * positions * (2 * down_weight.numel() + conv_weight.numel())


def products(x: Tensor, down_weight: Tensor, conv_weight: Tensor, class_token: bool, **_: Any) -> list[Product]:
    positions = x.shape[0] * x.shape[1] * (x.shape[2] - int(class_token))
    normed = ["x", "norm_weight", "norm_bias"]
    down = [*normed, "down_weight", "down_bias"]
    return [
        (2 * positions * down_weight.numel(), normed, ["down_weight"]),
        (2 * positions * conv_weight.numel(), down, ["conv_weight"]),
        (2 * positions * down_weight.numel(), [*down, "conv_weight", "conv_bias"], ["up_weight"]),
    ]


_PLAIN = {"normed": False, "biases": False, "class_token": False, "residual": False, "activation": "none"}


def check(
    x, norm_weight, norm_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias, eps, activation,
    class_token, residual,
) -> None:  # fmt: skip
    if x.dim() != 4 or x.shape[2] < int(class_token):
        shape = "(batch, frames, 1 + patches, channels)" if class_token else "(batch, frames, patches, channels)"
        raise ValueError(f"x must be {shape}, got {tuple(x.shape)}")
    check_activation(activation)
    if norm_weight is None and norm_bias is not None:
        raise ValueError("norm_bias is given without a norm_weight: give both, or neither for no norm")
    if conv_weight.dim() != 2:
        raise ValueError(f"conv_weight must be (inner, kernel), got {tuple(conv_weight.shape)}")
    channels, (inner, kernel) = x.shape[-1], conv_weight.shape
    shapes = {
        "norm_weight": (norm_weight, (channels,)),
        "norm_bias": (norm_bias, (channels,)),
        "down_weight": (down_weight, (inner, channels)),
        "down_bias": (down_bias, (inner,)),
        "conv_bias": (conv_bias, (inner,)),
        "up_weight": (up_weight, (channels, inner)),
        "up_bias": (up_bias, (channels,)),
    }
    for name, (parameter, shape) in shapes.items():
        if parameter is not None and parameter.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(parameter.shape)}")
    if kernel % 2 == 0:
        raise ValueError(f"conv_weight must have an odd number of frames, got {kernel}")


SPEC = Spec(
    name="local_temporal",
    axes={
        "x": "(batch, frames, 1 + patches, channels), without the 1 where class_token is False",
        "norm_weight": "(channels,)",
        "norm_bias": "(channels,)",
        "down_weight": "(inner, channels)",
        "down_bias": "(inner,)",
        "conv_weight": "(inner, kernel)",
        "conv_bias": "(inner,)",
        "up_weight": "(channels, inner)",
        "up_bias": "(channels,)",
        "result": "the shape of x",
    },
    reference=reference,
    make=make,
    awkward=(
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
    flops=flops,
    products=products,
    differentiable=(
        "x",
        "norm_weight",
        "norm_bias",
        "down_weight",
        "down_bias",
        "conv_weight",
        "conv_bias",
        "up_weight",
        "up_bias",
    ),
)

OP = Op(
    SPEC,
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor down_weight, Tensor? down_bias, Tensor conv_weight, "
    "Tensor? conv_bias, Tensor up_weight, Tensor? up_bias, float eps, str activation, bool class_token, "
    "bool residual) -> Tensor",
    [
        Backend("cpu", run_cpu, not_supported_reasons, devices=("cpu",)),
        Backend(
            "triton",
            run_triton,
            triton_reasons,
            devices=triton.DEVICES,
            backward=backward_triton,
            saved=saved_triton,
            train=lambda *given: run_triton(*given[:-1], h=given[-1][0]),
        ),
        Backend("torch", run_torch, differentiable=True),
    ],
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
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
    """Patches plus up(activation(conv over time(down(layer_norm(patches))))); the class token passes by.

    Args:
        x: `(batch, frames, 1 + patches, channels)`.
        norm_weight, norm_bias, up_bias: `(channels,)`. down_bias, conv_bias: `(inner,)`.
        down_weight: `(inner, channels)`. conv_weight: `(inner, kernel)`, kernel odd. up_weight: `(channels, inner)`.
            A norm_weight of None leaves the layer norm out, a bias of None the bias.
        activation: `"quick_gelu"` (x·sigmoid(1.702·x)), `"gelu"` (the erf form) or `"none"`.
        class_token: False where x has none: `(batch, frames, patches, channels)`.
        residual: False leaves the addition of the patches out; a class token still passes by.

    Returns a new contiguous tensor of x's shape and dtype. Source: mPLUG-2 (arXiv 2302.00402), section 3.2; released
    name `lmhra`. UniFormerV2's local MHRA, ST-Adapter and mPLUG-Owl-video's local temporal module are the same operator
    with other arguments.

    Raises:
        ValueError: shapes that do not go together, an even kernel, an unknown activation, or a norm_bias alone.
    """
    return (  # type: ignore[return-value]
        x, norm_weight, norm_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias, eps, activation,
        class_token, residual,
    )  # fmt: skip

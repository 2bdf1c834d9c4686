"""The local temporal module of mPLUG-2 and similar modules of other video models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mplug2_fast.nn.eight_bit import EightBitLinear
from mplug2_fast.nn.layer_norm import LayerNorm
from mplug2_fast.nn.parts import is_eight_bit, plain
from mplug2_fast.ops.linear_act import EAGER, Activation
from mplug2_fast.ops.local_temporal import local_temporal, temporal_conv_act
from mplug2_fast.ops.residual import would_round
from mplug2_fast.ops.runtime.autocast import autocast_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

Norm = Literal["layer", "batch"]
Layout = Literal["channels_last", "channels_first"]

_PARTS = ("ln", "bn", "down_proj", "conv", "up_proj")


class LocalTemporal(nn.Module):
    """x + up(activation(depthwise convolution over time(down(norm(x))))) on patches. The class token passes unchanged.

    A new module is the identity, because its up-projection is zero. The defaults are mPLUG-2's module with the official
    names: `ln`, `down_proj`, `conv` and `up_proj`, the last three shaped as in `nn.Conv3d`. A batch norm is named `bn`.

    Args:
        dim: channels.
        reduction: the inner channels are int(dim // reduction), unless `inner` is given.
        kernel_size: frames, odd.
        eps: of the norm.
        inner: inner channels.
        norm: `"layer"` over the channels of a token, `"batch"` as `nn.BatchNorm3d` over (batch, frames, patches), or
            None.
        activation: `"quick_gelu"`, `"gelu"` (erf) or `"none"`.
        class_token: whether the first token of each frame is a class token.
        residual: False leaves out the addition of x. A class token still passes unchanged.
        bias: whether the three products have one.
        layout: of x: `"channels_last"` is `(..., frames, tokens, dim)`, `"channels_first"` is
            `(batch, dim, frames, height, width)` without a class token.

    Raises:
        ValueError: an even kernel_size, an unknown norm, activation or layout, or channels first with a class token.

    Source: mPLUG-2 (arXiv 2302.00402), section 3.2; official name `lmhra`. Similar modules: UniFormerV2's local MHRA
    (arXiv 2211.09552), ST-Adapter (arXiv 2206.13559), mPLUG-Owl-video's local temporal module (arXiv 2304.14178).
    """

    def __init__(
        self,
        dim: int,
        reduction: float = 2,
        kernel_size: int = 3,
        eps: float = 1e-5,
        *,
        inner: int | None = None,
        norm: Norm | None = "layer",
        activation: Activation = "quick_gelu",
        class_token: bool = True,
        residual: bool = True,
        bias: bool = True,
        layout: Layout = "channels_last",
    ) -> None:
        if norm not in ("layer", "batch", None):
            raise ValueError(f"norm is {norm!r}: it must be 'layer', 'batch' or None")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        inner = int(dim // reduction) if inner is None else inner
        super().__init__()
        self._compose(
            {"layer": LayerNorm, "batch": nn.BatchNorm3d}[norm](dim, eps=eps) if norm else None,
            nn.Conv3d(dim, inner, 1, bias=bias),
            nn.Conv3d(inner, inner, (kernel_size, 1, 1), padding=(kernel_size // 2, 0, 0), groups=inner, bias=bias),
            nn.Conv3d(inner, dim, 1, bias=bias),
            activation=activation,
            class_token=class_token,
            residual=residual,
            layout=layout,
        )
        self.reset_parameters()

    @classmethod
    def around(
        cls,
        *,
        norm: nn.LayerNorm | nn.BatchNorm3d | nn.SyncBatchNorm | None,
        down_proj: nn.Module,
        conv: nn.Module,
        up_proj: nn.Module,
        activation: Activation = "quick_gelu",
        class_token: bool = True,
        residual: bool = True,
        layout: Layout = "channels_last",
    ) -> Self:
        """Builds a module around the layers of another one. It shares them: nothing is copied or initialised, and each
        layer stays in its own mode, training or evaluation.

        Args:
            norm: a layer norm with a weight, a batch norm, or None.
            down_proj, up_proj: `nn.Linear`, or a convolution with a kernel of 1.
            conv: a depthwise convolution over time only, with stride 1, zero-padded to keep the number of frames.
            activation, class_token, residual, layout: as for the class.

        Raises:
            ValueError: unsupported layers.
        """
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._compose(
            norm,
            down_proj,
            conv,
            up_proj,
            activation=activation,
            class_token=class_token,
            residual=residual,
            layout=layout,
        )
        module.training = down_proj.training
        return module

    def _compose(
        self,
        norm: nn.Module | None,
        down_proj: nn.Module,
        conv: nn.Module,
        up_proj: nn.Module,
        *,
        activation: Activation,
        class_token: bool,
        residual: bool,
        layout: Layout,
    ) -> None:
        if activation not in EAGER:
            raise ValueError(f"activation is {activation!r}: it must be one of {', '.join(EAGER)}")
        if layout not in ("channels_last", "channels_first"):
            raise ValueError(f"layout is {layout!r}: it must be 'channels_last' or 'channels_first'")
        if layout == "channels_first" and class_token:
            raise ValueError("(batch, dim, frames, height, width) has no class token: pass class_token=False")
        check_layers(norm, down_proj, conv, up_proj)
        self.activation: Activation = activation
        self.class_token, self.residual, self.layout = class_token, residual, layout
        batched = isinstance(norm, _BatchNorm)
        self.ln = None if batched else norm
        self.bn = norm if batched else None
        self.down_proj, self.conv, self.up_proj = down_proj, conv, up_proj
        self._axes = tuple(layer.weight.dim() - 2 for layer in (down_proj, conv, up_proj))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for layer in (self.ln, self.bn, self.down_proj, self.conv):
            if layer is not None:
                layer.reset_parameters()
        for parameter in self.up_proj.parameters():
            parameter.zero_()

    def load_renamed(self, state_dict: Mapping[str, Tensor], **names: str) -> None:
        """Loads parameters and running statistics of a similar module whose layers have other names. Its products may
        be linear layers or convolutions.

        Args:
            state_dict: the other module's. Keys of other layers are ignored.
            names: maps `ln`, `bn`, `down_proj`, `conv` or `up_proj` to the other module's name for that layer, such as
                `ln="blocks.0.norm"`. Layers that are not given have the same name.

        Raises:
            ValueError: this class has no layer of that name.
            RuntimeError: a key is missing or has the wrong shape, as for `load_state_dict`.
        """
        if unknown := names.keys() - set(_PARTS):
            raise ValueError(f"unknown layer {', '.join(sorted(unknown))}: use {', '.join(_PARTS)}")
        renamed = {}
        for key, own in self.state_dict().items():
            layer, kind = key.split(".")
            if (theirs := f"{names.get(layer, layer)}.{kind}") in state_dict:
                value = state_dict[theirs]
                renamed[key] = value.reshape(own.shape) if _squeezed(value) == _squeezed(own) else value
        self.load_state_dict(renamed)

    def forward(self, x: Tensor) -> Tensor:
        """x and result: `(..., frames, tokens, dim)` with any leading axes, or `(batch, dim, frames, height, width)`,
        depending on the layout. The tokens of a frame are its class token, if there is one, and its patches."""
        if self.layout == "channels_first":
            if x.dim() != 5:
                raise ValueError(f"x must be (batch, dim, frames, height, width), got {tuple(x.shape)}")
            out = self._forward(x.permute(0, 2, 3, 4, 1).flatten(2, 3))
            return out.unflatten(2, x.shape[-2:]).permute(0, 4, 1, 2, 3)
        if x.dim() == 4:
            return self._forward(x)
        if x.dim() < 3:
            raise ValueError(f"x must be (..., frames, tokens, dim), got {tuple(x.shape)}")
        return self._forward(x[None] if x.dim() == 3 else x.flatten(0, -4)).view(x.shape)

    def _forward(self, x: Tensor) -> Tensor:
        """x and result: `(batch, frames, tokens, dim)`."""
        norm = self.bn if self.ln is None else self.ln
        layers = (self.down_proj, self.conv, self.up_proj)
        options = {"activation": self.activation, "class_token": self.class_token, "residual": self.residual}
        if plain(*layers) and (norm is None or plain(norm)):
            return compute(x, norm, *layers, **options)
        if is_eight_bit(self.down_proj, self.up_proj) and plain(self.conv) and self.bn is None:
            down = functools.partial(self.down_proj, norm=self.ln)
            return in_eight_bits(x, None, down, self.conv, self.up_proj, **options)
        patches = x[:, :, 1:] if self.class_token else x
        out = self._call_layers(patches)
        out = patches + out if self.residual else out
        return torch.cat([x[:, :, :1].to(out.dtype), out], dim=2) if self.class_token else out

    def _call_layers(self, patches: Tensor) -> Tensor:
        """The update of patches `(batch, frames, patches, dim)`, by calls of every layer."""
        layers = (self.down_proj, self.conv, self.up_proj)
        down, conv, up = (
            0 if isinstance(layer, EightBitLinear) else axes for layer, axes in zip(layers, self._axes, strict=True)
        )
        if self.ln is not None:
            patches = self.ln(patches)
        elif self.bn is not None:
            patches = _channels_first(self.bn, patches, 3)
        inner = _channels_first(self.conv, _channels_first(self.down_proj, patches, down), conv)
        return _channels_first(self.up_proj, EAGER[self.activation](inner), up)

    def extra_repr(self) -> str:
        settings = ("activation", "class_token", "residual", "layout")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in settings)


def folds(norm: nn.Module | None, x: Tensor) -> bool:
    """Whether a batch norm is folded into the product after it: in evaluation mode, and not in a narrow type, which
    would lose precision if the mean is far from zero."""
    if not isinstance(norm, _BatchNorm) or norm.training or norm.running_mean is None:
        return False
    return x.element_size() >= 4 and autocast_dtype(x) is None


def compute(
    x: Tensor,
    norm: nn.Module | None,
    down_proj: nn.Module,
    conv: nn.Module,
    up_proj: nn.Module,
    *,
    activation: Activation,
    class_token: bool,
    residual: bool,
    keep_class_token: bool = False,
) -> Tensor:
    """`ops.local_temporal` with the parameters of layers, of x `(batch, frames, tokens, dim)`.

    keep_class_token: under autocast, a class token without a residual keeps its type, and so does the result.
    """
    batch_norm = norm if isinstance(norm, _BatchNorm) else None
    ln = norm if batch_norm is None else None
    weight, bias = down_proj.weight.flatten(1), down_proj.bias
    if folds(norm, x):
        weight, bias = fold_batch_norm(batch_norm, weight, bias)
        batch_norm = None
    adds_outside = batch_norm is not None or (would_round(x) and (residual or (class_token and keep_class_token)))
    first = int(class_token)
    given = x[:, :, first:] if adds_outside else x
    if batch_norm is not None:
        given = batch_norm(given.reshape(-1, given.shape[-1], 1, 1, 1)).view(given.shape)
    out = local_temporal(
        given,
        None if ln is None else ln.weight,
        None if ln is None else ln.bias,
        weight,
        bias,
        conv.weight.flatten(1),
        conv.bias,
        up_proj.weight.flatten(1),
        up_proj.bias,
        eps=1e-5 if ln is None else ln.eps,
        activation=activation,
        class_token=class_token and not adds_outside,
        residual=residual and not adds_outside,
    )
    if not adds_outside:
        return out
    out = x[:, :, first:] + out if residual else out
    if not class_token:
        return out
    token = x[:, :, :1]
    return torch.cat([token if keep_class_token else token.to(out.dtype), out], dim=2)


def in_eight_bits(
    x: Tensor,
    norm: Callable[[Tensor], Tensor] | None,
    down: Callable[..., Tensor],
    conv: nn.Module,
    up: Callable[..., Tensor],
    *,
    activation: Activation,
    class_token: bool,
    residual: bool,
) -> Tensor:
    """`compute` with two products of 8-bit weights, such as `Int8Linear`. The class tokens go through them too."""
    inner = down(x if norm is None else norm(x))
    inner = temporal_conv_act(inner, conv.weight.flatten(1), conv.bias, activation)
    out = up(inner, residual=x if residual else None)
    if class_token:
        out[:, :, 0] = x[:, :, 0]
    return out


def _channels_first(layer: nn.Module, x: Tensor, axes: int) -> Tensor:
    """Calls a layer with x `(batch, frames, patches, channels)` in the order of axes that it expects.

    axes: 0 for a linear layer, which takes `(..., channels)`; 1, 2 or 3 for a convolution, which takes `(batch,
        channels, ...)`. A convolution over 1 axis gets only the frames, with each patch as a row of the batch.
    """
    if axes == 0:
        return layer(x)
    if axes == 1:
        out = layer(x.permute(0, 2, 3, 1).flatten(0, 1))
        return out.unflatten(0, (x.shape[0], x.shape[2])).permute(0, 3, 1, 2)
    x = x.permute(0, 3, 1, 2)
    out = layer(x) if axes == 2 else layer(x[..., None]).squeeze(-1)
    return out.permute(0, 2, 3, 1)


def fold_batch_norm(bn: _BatchNorm, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight `(inner, dim)` and bias of the product after a batch norm, with the norm's running statistics folded in.

    The fold is computed in at least float32 and cast once.
    """
    dtype = torch.promote_types(bn.running_var.dtype, torch.float32)
    scale = (bn.running_var.to(dtype) + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight
    shift = -scale * bn.running_mean
    if bn.bias is not None:
        shift = shift + bn.bias
    moved = (weight * shift).sum(dim=1)  # stays wide under autocast
    if bias is not None:
        moved = moved + bias
    return (weight * scale).to(weight.dtype), moved.to(weight.dtype)


def check_layers(norm: nn.Module | None, down_proj: nn.Module, conv: nn.Module, up_proj: nn.Module) -> None:
    if isinstance(norm, nn.LayerNorm):
        if norm.weight is None or len(norm.normalized_shape) != 1:
            raise ValueError(f"a layer norm must be over one axis and have a weight, got {norm}")
    elif norm is not None and not isinstance(norm, (nn.BatchNorm3d, nn.SyncBatchNorm)):
        raise ValueError(f"norm must be a LayerNorm, a BatchNorm3d, a SyncBatchNorm or None, got {norm}")
    for name, layer in (("down_proj", down_proj), ("up_proj", up_proj)):
        if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) or layer.weight[0, 0].numel() != 1:
            raise ValueError(f"{name} must be a Linear or a convolution with a kernel of 1, got {layer}")
    inner, kernel = conv.weight.shape[0], conv.weight.numel() // conv.weight.shape[0]
    if (
        not isinstance(conv, nn.modules.conv._ConvNd)
        or conv.weight.shape[1:3] != (1, kernel)
        or kernel % 2 == 0
        or conv.groups != inner
        or any(stride != 1 for stride in conv.stride)
        or any(dilation != 1 for dilation in conv.dilation)
        or conv.padding != (kernel // 2, *(0,) * (conv.weight.dim() - 3))
        or conv.padding_mode != "zeros"
    ):
        raise ValueError(
            "conv must be a depthwise convolution over an odd number of frames, with stride 1 and zero padding that "
            f"keeps the number of frames, got {conv}"
        )


def _squeezed(tensor: Tensor) -> tuple[int, ...]:
    return tuple(size for size in tensor.shape if size != 1)

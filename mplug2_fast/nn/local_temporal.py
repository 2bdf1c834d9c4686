"""The local temporal module of mPLUG-2 and its siblings, usable in any video model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from mplug2_fast.nn.layer_norm import LayerNorm
from mplug2_fast.nn.parts import plain
from mplug2_fast.ops.linear_act import EAGER, Activation
from mplug2_fast.ops.local_temporal import local_temporal
from mplug2_fast.ops.residual import would_round

if TYPE_CHECKING:
    from typing_extensions import Self

Norm = Literal["layer", "batch"]
Layout = Literal["channels_last", "channels_first"]

_PARTS = ("ln", "bn", "down_proj", "conv", "up_proj")


class LocalTemporal(nn.Module):
    """x + up(activation(depthwise convolution over time(down(norm(x))))) on patches; the class token passes by.

    Starts as the identity: the up-projection is zero. The defaults are mPLUG-2's module under its released names:
    `ln`, `down_proj`, `conv` and `up_proj`, those with the shapes of `nn.Conv3d`; a batch norm is named `bn`.

    Args:
        dim: channels. reduction: int(dim // reduction) channels inside, or as many as `inner` says.
        kernel_size: frames, odd. eps: of the norm.
        norm: `"layer"` over the channels of a token, `"batch"` as `nn.BatchNorm3d` over (batch, frames, patches), or
            None.
        activation: `"quick_gelu"`, `"gelu"` (erf) or `"none"`.
        class_token: whether the first token of each frame is one.
        residual: False leaves the addition of x out; a class token still passes by.
        bias: whether the three products have one.
        layout: of x, `"channels_last"`: `(..., frames, tokens, dim)`, or `"channels_first"`:
            `(batch, dim, frames, height, width)`, without a class token.

    Raises:
        ValueError: an even kernel_size, an unknown norm, activation or layout, channels first with a class token.

    Source: mPLUG-2 (arXiv 2302.00402), section 3.2; released name `lmhra`. The siblings: UniFormerV2's local MHRA
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
        """A module that computes with the layers of another, which it shares: nothing is copied or initialised.

        Args:
            norm: a layer norm with a weight, a batch norm, or None for none.
            down_proj, up_proj: `nn.Linear`, or a convolution whose kernel is 1.
            conv: a depthwise convolution over time alone, of stride 1, padded with zeros to keep the number of frames.
            activation, class_token, residual, layout: as above.

        Raises:
            ValueError: layers of another kind.
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
        return module.train(down_proj.training)

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
        batched = isinstance(norm, nn.modules.batchnorm._BatchNorm)
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
        """Copies a sibling's parameters and running statistics in, whether its layers are linear or convolutions.

        Args:
            state_dict: the sibling's; keys of no layer that is named are passed over.
            names: for each of `ln`, `bn`, `down_proj`, `conv` and `up_proj` that this module has, the name of the
                sibling's layer, `ln="blocks.0.norm"`; for what is left out it is the same.

        Raises:
            ValueError: a name of no such layer.
            RuntimeError: a key is missing, or another shape than this module's, as for `load_state_dict`.
        """
        if unknown := names.keys() - set(_PARTS):
            raise ValueError(f"there is no layer {', '.join(sorted(unknown))}: name {', '.join(_PARTS)}")
        renamed = {}
        for key, own in self.state_dict().items():
            layer, kind = key.split(".")
            if (theirs := f"{names.get(layer, layer)}.{kind}") in state_dict:
                value = state_dict[theirs]
                renamed[key] = value.reshape(own.shape) if _squeezed(value) == _squeezed(own) else value
        self.load_state_dict(renamed)

    def forward(self, x: Tensor) -> Tensor:
        """x and result: `(..., frames, tokens, dim)`, any leading axes or none, or `(batch, dim, frames, height,
        width)` as the layout says; the tokens of a frame are its class token, where there is one, and its patches."""
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
        is_plain = plain(*layers) if norm is None else plain(norm, *layers)
        on_batch = self.bn is not None and is_plain and (self.bn.training or self.bn.running_mean is None)
        if is_plain and not on_batch and not (self.residual and would_round(x)):
            return self._operator(x, self.class_token, self.residual)
        patches = x[:, :, 1:] if self.class_token else x
        if is_plain:
            out = self._operator(self._batch_norm(patches) if on_batch else patches, False, False, folded=not on_batch)
        else:
            out = self._by_layers(patches)
        out = patches + out if self.residual else out
        return torch.cat([x[:, :, :1].to(out.dtype), out], dim=2) if self.class_token else out

    def _by_layers(self, patches: Tensor) -> Tensor:
        """The update of patches `(batch, frames, patches, dim)`, every layer called as in the modules that it came
        from."""
        down, conv, up = self._axes
        if self.ln is not None:
            patches = self.ln(patches)
        elif self.bn is not None:
            patches = _channels_first(self.bn, patches, 3)
        inner = _channels_first(self.conv, _channels_first(self.down_proj, patches, down), conv)
        return _channels_first(self.up_proj, EAGER[self.activation](inner), up)

    def _batch_norm(self, patches: Tensor) -> Tensor:
        """The norm by the statistics of this batch, which it keeps."""
        assert self.bn is not None
        return self.bn(patches.reshape(-1, patches.shape[-1], 1, 1, 1)).view(patches.shape)

    def _operator(self, x: Tensor, class_token: bool, residual: bool, folded: bool = True) -> Tensor:
        ln, down_weight, down_bias = self.ln, self.down_proj.weight.flatten(1), self.down_proj.bias
        if self.bn is not None and folded:
            down_weight, down_bias = fold_batch_norm(self.bn, down_weight, down_bias)
        return local_temporal(
            x,
            None if ln is None else ln.weight,
            None if ln is None else ln.bias,
            down_weight,
            down_bias,
            self.conv.weight.flatten(1),
            self.conv.bias,
            self.up_proj.weight.flatten(1),
            self.up_proj.bias,
            eps=1e-5 if ln is None else ln.eps,
            activation=self.activation,
            class_token=class_token,
            residual=residual,
        )

    def extra_repr(self) -> str:
        settings = ("activation", "class_token", "residual", "layout")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in settings)


def _channels_first(layer: nn.Module, x: Tensor, axes: int) -> Tensor:
    """layer(x) of x `(batch, frames, patches, channels)`, in the order of axes that it takes: `(..., channels)` for a
    linear layer, which has 0 axes, and `(batch, channels, ...)` for a convolution over 1, 2 or 3. One over 1 sees the
    frames alone, each patch as a row of the batch."""
    if axes == 0:
        return layer(x)
    if axes == 1:
        out = layer(x.permute(0, 2, 3, 1).flatten(0, 1))
        return out.unflatten(0, (x.shape[0], x.shape[2])).permute(0, 3, 1, 2)
    x = x.permute(0, 3, 1, 2)
    out = layer(x) if axes == 2 else layer(x[..., None]).squeeze(-1)
    return out.permute(0, 2, 3, 1)


def fold_batch_norm(bn: nn.modules.batchnorm._BatchNorm, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """A batch norm by its running statistics and the product after it, weight `(inner, dim)`, as one product."""
    dtype = torch.promote_types(bn.running_var.dtype, torch.float32)
    scale = (bn.running_var.to(dtype) + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight
    shift = -scale * bn.running_mean
    if bn.bias is not None:
        shift = shift + bn.bias
    moved = (weight * shift).sum(dim=1)  # in the wide type, under autocast too
    if bias is not None:
        moved = moved + bias
    return (weight * scale).to(weight.dtype), moved.to(weight.dtype)


def check_layers(norm: nn.Module | None, down_proj: nn.Module, conv: nn.Module, up_proj: nn.Module) -> None:
    if isinstance(norm, nn.LayerNorm):
        if norm.weight is None or len(norm.normalized_shape) != 1:
            raise ValueError(f"the layer norm must be over one axis and have a weight, got {norm}")
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
            "conv must be a depthwise convolution over an odd number of frames, of stride 1, padded with zeros to keep "
            f"their number, got {conv}"
        )


def _squeezed(tensor: Tensor) -> tuple[int, ...]:
    return tuple(size for size in tensor.shape if size != 1)

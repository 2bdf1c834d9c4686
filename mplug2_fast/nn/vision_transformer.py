"""The vision encoders. Hidden states are contiguous `(batch, frames, 1 + patches, channels)` throughout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.nn import LayerNorm, TemporalBlock
from mplug2_fast.nn.config import TowerConfig, VisionConfig
from mplug2_fast.nn.layer_norm import norm_of_sum
from mplug2_fast.ops.linear_act import linear_act

PIXEL_ROW_MULTIPLE = 64
"""On a GPU, rows of pixels are padded to a multiple of this. Rows of 588 values (patches of 14 pixels) do not start at
multiples of 16 bytes, which makes the product four times slower."""


def padded(pixels: Tensor, zeros: int) -> Tensor:
    """Flattens and zero-pads `(B, T', rows, columns, ...)` to `(B, T', rows, columns, values + zeros)`, in one copy."""
    row = pixels[0, 0, 0, 0].numel()
    out = pixels.new_empty(*pixels.shape[:4], row + zeros)
    out[..., :row].unflatten(-1, pixels.shape[4:]).copy_(pixels)
    out[..., row:].zero_()
    return out


class ImageTower(nn.Module):
    """CLIP's image tower. Its parts, and the way of frames through its blocks.

    Args:
        config: sizes. kernel: frames that a patch spans.
        block: options of the blocks, see `TemporalBlock`.
    """

    def __init__(self, config: Any, kernel: int = 1, **block: Any) -> None:
        super().__init__()
        self.config = config
        # The patch convolution as a matrix (width, 3·kernel·patch·patch).
        self.patch_weight = nn.Parameter(torch.empty(config.width, 3 * kernel * config.patch_size**2))
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + config.num_patches, config.width))
        self.norm_pre = LayerNorm(config.width, eps=config.layer_norm_eps)
        sizes = {"mlp_ratio": config.mlp_ratio, "eps": config.layer_norm_eps}
        self.blocks = nn.ModuleList(
            [TemporalBlock(config.width, config.num_heads, **sizes, **block) for _ in range(config.layers)]
        )
        self.norm_post = LayerNorm(config.width, eps=config.layer_norm_eps)

    def encode(self, video: Tensor, **options: bool) -> Tensor:
        """Video `(B, 3, T, H, W)` to `(B, T', 1 + L, width)`, each frame with its class token in front. Options are of
        the blocks."""
        size = self.config.image_size
        if video.shape[-2:] != (size, size):
            raise ValueError(
                f"video frames have {video.shape[-2]}×{video.shape[-1]} pixels, the model was built for {size}×{size}; "
                "resize the frames, or build the model with that image_size"
            )
        x = self.patches(video.to(self.patch_weight.dtype))
        # Position 0 is a row of zeros in x: add the class token there, with its position.
        embeddings = self.positional_embedding + F.pad(self.class_embedding[None], (0, 0, 0, x.shape[2]))
        x = F.pad(x, (0, 0, 1, 0))
        x = norm_of_sum(self.norm_pre, x, embeddings.expand_as(x))
        for block in self.blocks:
            x = block(x, **options)
        return x

    def cut(self, video: Tensor) -> Tensor:
        """Video `(B, 3, T, H, W)` to pixels `(B, 3, T', H, W, kernel)`."""
        return video[..., None]

    def patches(self, video: Tensor) -> Tensor:
        """Video `(B, 3, T, H, W)` to embedded patches `(B, T', L, width)`."""
        video = self.cut(video)
        batch, channels, frames, height, width, kernel = video.shape
        patch = self.config.patch_size
        grid = (height // patch, patch, width // patch, patch)
        video = video.reshape(batch, channels, frames, *grid, kernel)
        pixels, weight = video.permute(0, 2, 3, 5, 1, 7, 4, 6), self.patch_weight
        if pixels.is_cuda and weight.shape[1] % PIXEL_ROW_MULTIPLE:
            pixels, weight = (
                padded(pixels, -weight.shape[1] % PIXEL_ROW_MULTIPLE),
                F.pad(weight, (0, -weight.shape[1] % PIXEL_ROW_MULTIPLE)),
            )
        return linear_act(pixels.flatten(4).flatten(2, 3), weight)


class ImageEncoder(ImageTower):
    """Video `(B, 3, T, H, W)` to tokens `(B, T·(1 + L), width)`: frames as images, each with its class token.

    Args:
        attention_dropout: on the attention weights, in training.

    Source: mPLUG's `visual_encoder.visual`.
    """

    def __init__(self, config: TowerConfig, attention_dropout: float = 0.0) -> None:
        super().__init__(config, temporal=False, attention_dropout=attention_dropout)

    def forward(self, video: Tensor) -> Tensor:
        return self.norm_post(self.encode(video).flatten(1, 2))


class VisionTransformer(ImageTower):
    """Video `(B, 3, T, H, W)` to tokens `(B, 1 + T'·L, width)`: the mean class token, then patches, frame by frame."""

    def __init__(self, config: VisionConfig) -> None:
        temporal = {"reduction": config.temporal_reduction, "kernel_size": config.temporal_kernel_size}
        super().__init__(config, 3 if config.temporal_downsampling else 1, **temporal)

    def cut(self, video: Tensor) -> Tensor:
        if not self.config.temporal_downsampling:
            return video[..., None]
        return F.pad(video, (0, 0, 0, 0, 1, 1)).unfold(2, 3, self.config.temporal_stride)

    def forward(self, video: Tensor, *, temporal: bool = True) -> Tensor:
        x = self.encode(video) if temporal else self.encode(video, temporal=False)
        class_token = x[:, :, 0].mean(dim=1, keepdim=True)
        return self.norm_post(torch.cat([class_token, x[:, :, 1:].flatten(1, 2)], dim=1))

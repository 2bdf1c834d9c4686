"""Vision encoders. mPLUG-2's is a CLIP image tower over frames, with local temporal modules between its sub-layers.

Activations are `(1 + patches, batch * frames, channels)`, as `nn.MultiheadAttention` has them by default; the local
temporal modules permute to `(batch, channels, frames, height, width)` and back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mplug2_fast.nn.config import TowerConfig, VisionConfig


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class LocalTemporal(nn.Module):
    """LayerNorm → 1×1×1 down → depthwise convolution over time → QuickGELU → 1×1×1 up (official name: `lmhra`)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        inner = config.width // config.temporal_reduction
        kernel = config.temporal_kernel_size
        self.ln = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.down_proj = nn.Conv3d(config.width, inner, kernel_size=1)
        self.conv = nn.Conv3d(inner, inner, (kernel, 1, 1), padding=(kernel // 2, 0, 0), groups=inner)
        self.act = QuickGELU()
        self.up_proj = nn.Conv3d(inner, config.width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """x and result: `(batch, channels, frames, height, width)`; the residual is the caller's."""
        x = self.ln(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
        return self.up_proj(self.act(self.conv(self.down_proj(x))))


class AttentionBlock(nn.Module):
    """CLIP's block."""

    def __init__(self, config: TowerConfig, dropout: float = 0.0) -> None:
        super().__init__()
        width = config.width
        self.attn = nn.MultiheadAttention(width, config.num_heads, dropout=dropout)
        self.ln_1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, config.mlp_ratio * width),
                gelu=QuickGELU(),
                c_proj=nn.Linear(config.mlp_ratio * width, width),
            )
        )
        self.ln_2 = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def attend(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        return x + self.attn(normed, normed, normed, need_weights=False)[0]

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.ln_2(x))


class ResidualAttentionBlock(AttentionBlock):
    """CLIP's block with local temporal modules."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.lmhra1 = LocalTemporal(config)
        self.lmhra2 = LocalTemporal(config)

    def _local_temporal(self, module: LocalTemporal, x: Tensor, frames: int) -> Tensor:
        tokens, batch_frames, width = x.shape
        side = int((tokens - 1) ** 0.5)
        patches = x[1:].view(side, side, batch_frames // frames, frames, width).permute(2, 4, 3, 0, 1).contiguous()
        patches = patches + module(patches)
        patches = patches.permute(3, 4, 0, 2, 1).contiguous().view(tokens - 1, batch_frames, width)
        return torch.cat([x[:1], patches], dim=0)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        x = self.attend(self._local_temporal(self.lmhra1, x, frames))
        return self.feed_forward(self._local_temporal(self.lmhra2, x, frames))


class Transformer(nn.Module):
    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)


class ImageTransformer(nn.Module):
    """mPLUG's image tower: images `(B, 3, H, W)` to `(B, 1 + L, width)`, the class token in front."""

    def __init__(self, config: TowerConfig, dropout: float) -> None:
        super().__init__()
        patch, width = config.patch_size, config.width
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + config.num_patches, width))
        self.ln_pre = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.transformer = Transformer(AttentionBlock(config, dropout) for _ in range(config.layers))
        self.ln_post = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding).permute(1, 0, 2)
        for block in self.transformer.resblocks:
            x = block.feed_forward(block.attend(x))
        return self.ln_post(x.permute(1, 0, 2))


class VisionTransformer(nn.Module):
    """Video `(B, 3, T, H, W)` to tokens `(B, 1 + T'·L, width)`: the mean class token, then the patches, time-major."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        patch, width = config.patch_size, config.width
        down = config.temporal_downsampling
        self.conv1 = nn.Conv3d(
            3,
            width,
            kernel_size=(3 if down else 1, patch, patch),
            stride=(config.temporal_stride if down else 1, patch, patch),
            padding=(1 if down else 0, 0, 0),
            bias=False,
        )
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + config.num_patches, width))
        self.ln_pre = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.transformer = Transformer(ResidualAttentionBlock(config) for _ in range(config.layers))
        self.ln_post = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, video: Tensor) -> Tensor:
        x = self.conv1(video)
        batch, width, frames, _, _ = x.shape
        x = x.permute(0, 2, 3, 4, 1).reshape(batch * frames, -1, width)
        x = torch.cat([self.class_embedding.expand(batch * frames, 1, width), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding)
        x = x.permute(1, 0, 2)
        for block in self.transformer.resblocks:
            x = block(x, frames)
        x = x.permute(1, 0, 2).reshape(batch, frames, -1, width)
        class_token = x[:, :, 0].mean(dim=1, keepdim=True)
        patches = x[:, :, 1:].reshape(batch, -1, width)
        return self.ln_post(torch.cat([class_token, patches], dim=1))

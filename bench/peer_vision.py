"""The compiled peer's vision encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.peer_bert import merge_heads, split_heads
from mplug2_fast.models.mplug2.config import VisionConfig


class TemporalModule(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        inner, self.kernel = config.width // config.temporal_reduction, config.temporal_kernel_size
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.down = nn.Linear(config.width, inner)
        self.conv_weight = nn.Parameter(torch.empty(inner, self.kernel))
        self.conv_bias = nn.Parameter(torch.empty(inner))
        self.up = nn.Linear(inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, frames, 1 + patches, D)`; shifted products, which the compiler fuses with the activation."""
        h = self.down(self.norm(x[:, :, 1:]))
        frames = h.shape[1]
        padded = F.pad(h, (0, 0, 0, 0, self.kernel // 2, self.kernel // 2))
        h = self.conv_bias + sum(
            padded[:, tap : tap + frames] * self.conv_weight[:, tap].contiguous() for tap in range(self.kernel)
        )
        h = self.up(h * torch.sigmoid(1.702 * h))
        return torch.cat([x[:, :, :1], x[:, :, 1:] + h], dim=2)


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, eps = config.width, config.layer_norm_eps
        self.heads = config.num_heads
        self.temporal1, self.temporal2 = TemporalModule(config), TemporalModule(config)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.proj = nn.Linear(width, config.mlp_ratio * width), nn.Linear(config.mlp_ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.temporal1(x)
        q, k, v = split_heads(self.qkv(self.norm1(x)).flatten(0, 1), 3, self.heads)
        x = x + self.out(merge_heads(F.scaled_dot_product_attention(q, k, v))).view(x.shape)
        x = self.temporal2(x)
        h = self.fc(self.norm2(x))
        return x + self.proj(h * torch.sigmoid(1.702 * h))


class Vision(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = 3 if config.temporal_downsampling else 1
        self.conv = nn.Conv3d(
            3,
            config.width,
            (kernel, config.patch_size, config.patch_size),
            stride=(config.temporal_stride if kernel == 3 else 1, config.patch_size, config.patch_size),
            padding=(kernel // 2, 0, 0),
            bias=False,
        )
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.positions = nn.Parameter(torch.empty(1 + config.num_patches, config.width))
        self.norm_pre = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList([VisionBlock(config) for _ in range(config.layers)])
        self.norm_post = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, video: Tensor) -> Tensor:
        x = self.conv(video).flatten(3).permute(0, 2, 3, 1)  # (batch, frames, patches, D)
        x = torch.cat([self.class_embedding.expand(*x.shape[:2], 1, -1), x], dim=2)
        x = self.norm_pre(x + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.norm_post(torch.cat([x[:, :, 0].mean(dim=1, keepdim=True), x[:, :, 1:].flatten(1, 2)], dim=1))

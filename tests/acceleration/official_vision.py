"""A stand-in for the vision side of the official model: independent code, same attributes, arguments and results.

Activations are `(1 + patches, batch · frames, channels)`, as CLIP has them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """CLIP's layer norm, which computes in float32 for any input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def clip_mlp(width: int) -> nn.Sequential:
    mlp = nn.Sequential()
    mlp.add_module("c_fc", nn.Linear(width, 4 * width))
    mlp.add_module("gelu", QuickGELU())
    mlp.add_module("c_proj", nn.Linear(4 * width, width))
    return mlp


class LocalTemporal(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // 2
        self.ln = LayerNorm(width)
        self.down_proj = nn.Conv3d(width, inner, 1)
        self.conv = nn.Conv3d(inner, inner, (3, 1, 1), padding=(1, 0, 0), groups=inner)
        self.up_proj = nn.Conv3d(inner, width, 1)
        self.activation = QuickGELU()
        nn.init.zeros_(self.up_proj.weight)
        nn.init.zeros_(self.up_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, channels, frames, height, width)`."""
        normed = self.ln(x.movedim(1, -1)).movedim(-1, 1)
        return self.up_proj(self.activation(self.conv(self.down_proj(normed))))


class TemporalBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head = heads
        self.drop_path = nn.Identity()
        self.lmhra1 = LocalTemporal(width)
        self.lmhra2 = LocalTemporal(width)
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = clip_mlp(width)
        self.ln_2 = LayerNorm(width)
        self.attn_mask = None

    def attention(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False, attn_mask=self.attn_mask)[0]

    def temporal(self, module: LocalTemporal, x: Tensor, frames: int) -> Tensor:
        patches, rows, width = x[1:].shape
        side = int(patches**0.5)
        volume = x[1:].view(side, side, rows // frames, frames, width).permute(2, 4, 3, 0, 1).contiguous()
        volume = volume + self.drop_path(module(volume))
        moved = volume.flatten(3).permute(3, 0, 2, 1).contiguous().view(patches, rows, width)
        return torch.cat([x[:1], moved])

    def forward(self, x: Tensor, T: int = 8, use_checkpoint: bool = False) -> Tensor:
        x = self.temporal(self.lmhra1, x, T)
        x = x + self.drop_path(self.attention(self.ln_1(x)))
        x = self.temporal(self.lmhra2, x, T)
        return x + self.drop_path(self.mlp(self.ln_2(x)))


class TemporalTransformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.resblocks = nn.ModuleList([TemporalBlock(width, heads) for _ in range(layers)])

    def forward(self, x: Tensor, T: int) -> Tensor:
        for block in self.resblocks:
            x = block(x, T)
        return x


class VideoFormer(nn.Module):
    def __init__(self, resolution: int, patch: int, width: int, layers: int, output_dim: int, frames: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch), bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((resolution // patch) ** 2 + 1, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = TemporalTransformer(width, layers, width // 64)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, output_dim))
        self.num_frames = frames

    def forward(self, x: Tensor, skip_last_layer: bool = False, use_checkpoint: bool = True) -> Tensor:
        batch = x.shape[0]
        x = self.conv1(x)
        frames = x.shape[2]
        x = x.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)
        first = self.class_embedding.to(x.dtype) + x.new_zeros(x.shape[0], 1, x.shape[2])
        x = self.ln_pre(torch.cat([first, x], dim=1) + self.positional_embedding.to(x.dtype))
        x = self.transformer(x.permute(1, 0, 2), frames)
        x = x.permute(1, 0, 2).unflatten(0, (batch, frames))
        tokens = torch.cat([x[:, :, 0].mean(1, keepdim=True), x[:, :, 1:].flatten(1, 2)], dim=1)
        return self.ln_post(tokens)


class ResidualAttentionBlock(nn.Module):
    """The block of CLIP's text tower, which is stored but not used."""

    def __init__(self, width: int, heads: int, attn_mask: Tensor) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = clip_mlp(width)
        self.ln_2 = LayerNorm(width)
        self.attn_mask = attn_mask

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=self.attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, attn_mask: Tensor) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*[ResidualAttentionBlock(width, heads, attn_mask) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class XCLIP(nn.Module):
    """CLIP with a video tower."""

    def __init__(self, clip: dict, resolution: int, frames: int, context: int = 77) -> None:
        super().__init__()
        width = clip["twidth"]
        self.visual = VideoFormer(resolution, clip["patch"], clip["width"], clip["layers"], clip["embed_dim"], frames)
        mask = torch.full((context, context), float("-inf")).triu(1)
        self.transformer = Transformer(width, clip["tlayers"], max(1, width // 64), mask)
        self.token_embedding = nn.Embedding(clip["vocab"], width)
        self.positional_embedding = nn.Parameter(torch.randn(context, width))
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, clip["embed_dim"]))
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))

    def encode_image(self, image: Tensor, skip_last_layer: bool = False) -> Tensor:
        return self.visual(image, skip_last_layer)

    def encode_text(self, text: Tensor) -> Tensor:
        x = self.token_embedding(text) + self.positional_embedding
        x = self.ln_final(self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2))
        return x[torch.arange(len(x)), text.argmax(-1)] @ self.text_projection

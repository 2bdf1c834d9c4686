"""CLIP's text tower as the official files have it, under the names that follow `visual_encoder.`."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.models.mplug2.config import ClipConfig
from mplug2_fast.reference.vision import QuickGELU


class TextBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width))
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class ClipText(nn.Module):
    """Activations are `(tokens, batch, width)`. Texts are padded to the whole context, as CLIP does."""

    def __init__(self, config: ClipConfig, visual_width: int) -> None:
        super().__init__()
        width, context = config.token_width, config.context_length
        self.token_embedding = nn.Embedding(config.bpe_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context, width))
        self.transformer = nn.Module()
        blocks = [TextBlock(width, config.token_heads) for _ in range(config.token_layers)]
        self.transformer.resblocks = nn.ModuleList(blocks)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config.joint_dim))
        self.logit_scale = nn.Parameter(torch.empty([]))
        self.visual = nn.Module()
        self.visual.proj = nn.Parameter(torch.empty(visual_width, config.joint_dim))

    def encode_text(self, ids: Tensor) -> Tensor:
        """Ids `(B, tokens)` to `(B, joint_dim)`, of norm 1."""
        context = self.positional_embedding.shape[0]
        ids = F.pad(ids, (0, context - ids.shape[1]))
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((context, context), -torch.inf, dtype=x.dtype).triu(1)
        x = x.permute(1, 0, 2)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        x = self.ln_final(x.permute(1, 0, 2))
        x = x[torch.arange(len(ids)), ids.argmax(dim=-1)] @ self.text_projection
        return x / x.norm(dim=-1, keepdim=True)

    def encode_image(self, class_token: Tensor) -> Tensor:
        """Class tokens `(B, visual_width)`, after the last norm, to `(B, joint_dim)`, of norm 1."""
        x = class_token @ self.visual.proj
        return x / x.norm(dim=-1, keepdim=True)

    def forward(self, class_token: Tensor, ids: Tensor) -> Tensor:
        """The logits of all images with all texts."""
        return self.logit_scale.exp() * self.encode_image(class_token) @ self.encode_text(ids).T

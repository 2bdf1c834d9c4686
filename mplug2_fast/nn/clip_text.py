"""CLIP's text tower, and the projections into the space that it shares with images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.nn import MLP, LayerNorm, SelfAttention
from mplug2_fast.ops.linear_act import linear_act

TEMPERATURE = 0.07
"""At the start; the parameter is the logarithm of its inverse."""


class ClipTextBlock(nn.Module):
    """CLIP's pre-norm block. Each token sees itself and the tokens before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = MLP(width, 4 * width, "quick_gelu")
        self.ln_2 = LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """x and result: `(B, tokens, width)`."""
        x = x + self.attn(self.ln_1(x), causal=True)
        return x + self.mlp(self.ln_2(x))


class ClipText(nn.Module):
    """Features of texts and visual class tokens, of norm 1.

    Args:
        config: sizes of the tower. visual_width: channels of the vision encoder.

    Source: CLIP (arXiv 2103.00020), sections 2.4 and 3.1.
    """

    def __init__(self, config: Any, visual_width: int) -> None:
        super().__init__()
        width = config.token_width
        self.config = config
        self.token_embedding = nn.Embedding(config.bpe_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.blocks = nn.ModuleList([ClipTextBlock(width, config.token_heads) for _ in range(config.token_layers)])
        self.norm_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config.joint_dim))
        self.visual_projection = nn.Parameter(torch.empty(visual_width, config.joint_dim))
        self.logit_scale = nn.Parameter(torch.empty(1))  # FSDP2 shards no scalars

    def reset_parameters(self) -> None:
        nn.init.constant_(self.logit_scale, -math.log(TEMPERATURE))

    def text(self, ids: Tensor) -> Tensor:
        """Ids `(B, tokens)` to `(B, joint_dim)`. The end token, which has the largest id, stands for the text."""
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        last = x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)]
        return F.normalize(linear_act(self.norm_final(last), self.text_projection.T), dim=-1)

    def visual(self, class_token: Tensor) -> Tensor:
        """Class tokens `(B, visual_width)` of the vision encoder to `(B, joint_dim)`."""
        return F.normalize(linear_act(class_token, self.visual_projection.T), dim=-1)

"""Projections of visual inputs and texts into one space, for contrast."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.nn.parts import linear

TEMPERATURE = 0.07
"""The learned temperature at the start."""


class Contrast(nn.Module):
    """Two projections and a learned temperature.

    Args:
        dim: channels of both sides. embed_dim: channels of the common space.

    Source: ALBEF's contrast, as mPLUG (arXiv 2205.12005, section 3.3) has it.
    """

    def __init__(self, dim: int, embed_dim: int) -> None:
        super().__init__()
        self.vision_proj = nn.Linear(dim, embed_dim)
        self.text_proj = nn.Linear(dim, embed_dim)
        self.temperature = nn.Parameter(torch.empty(1))  # FSDP2 shards no scalars

    def reset_parameters(self) -> None:
        nn.init.constant_(self.temperature, TEMPERATURE)

    def visual(self, tokens: Tensor) -> Tensor:
        """Class tokens `(B, dim)`, or `(B, frames, dim)`, whose projections are averaged, to `(B, embed_dim)` of norm
        1."""
        projected = linear(self.vision_proj, tokens)
        return F.normalize(projected if projected.dim() == 2 else projected.mean(dim=1), dim=-1)

    def text(self, tokens: Tensor) -> Tensor:
        """Class tokens `(B, dim)` to `(B, embed_dim)` of norm 1."""
        return F.normalize(linear(self.text_proj, tokens), dim=-1)

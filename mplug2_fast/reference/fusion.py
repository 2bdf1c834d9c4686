"""Fusion encoder of mPLUG and mPLUG-2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mplug2_fast.nn.config import StacksConfig
from mplug2_fast.reference.bert import BertEncoder, BertLayer, cross_attention_mask, self_attention_mask


class FusionEncoder(nn.Module):
    """The last `fusion_layers` of the stored layers, with connected attention every `stride_layer`."""

    def __init__(self, config: StacksConfig) -> None:
        super().__init__()
        self.config = config
        first = config.stored_layers - config.fusion_layers
        self.encoder = BertEncoder(
            {first + n: BertLayer(config, cross_attention=not config.connected(n)) for n in range(config.fusion_layers)}
        )

    def forward(self, text: Tensor, text_mask: Tensor, visual: Tensor, visual_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (visual, text), of the shapes that came in."""
        for n, layer in enumerate(self.encoder.layer.values()):
            if not self.config.connected(n):
                memory_mask = cross_attention_mask(visual_mask, text.dtype)
                text = layer(text, self_attention_mask(text_mask, text.dtype), visual, memory_mask)
            else:
                both = layer(
                    torch.cat([visual, text], dim=1),
                    self_attention_mask(torch.cat([visual_mask, text_mask], dim=1), text.dtype),
                )
                visual = visual + both[:, : visual.shape[1]]
                text = both[:, visual.shape[1] :]
        return visual, text

"""The fusion encoder: text attends to an image or a video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mplug2_fast.nn.bert_layer import BertLayer


class FusionEncoder(nn.Module):
    """Cross-attention layers, and every `stride_layer` a connected layer over both together.

    Args:
        config: sizes of BERT layers, `fusion_layers`, and `connected(n)`.

    Source: the cross-modal skip-connection of mPLUG (arXiv 2205.12005, section 3.2).
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._connected = [config.connected(n) for n in range(config.fusion_layers)]
        self.layers = nn.ModuleList(
            [
                BertLayer.from_config(config, cross_attention=not connected, fused_projections=True)
                for connected in self._connected
            ]
        )

    def forward(self, text: Tensor, text_mask: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (visual, text), both with the leading axes of the text.

        Args:
            text: `(B, tokens, D)`, or `(B, texts, tokens, D)` for several texts of each visual input. These share the
                keys and values of cross-attention, until a connected layer gives each text a visual input of its own.
            text_mask: `(B, tokens)` or `(B, texts, tokens)`, 1 for tokens and 0 for padding.
            visual: `(B, S, D)`; all of it is seen.
        """
        for layer, connected in zip(self.layers, self._connected, strict=True):
            if connected:
                visual = _one_for_each(visual, text)
                both_mask = torch.cat([text_mask.new_ones(visual.shape[:-1]), text_mask], dim=-1)
                both = layer(torch.cat([visual, text], dim=-2), key_padding_mask=both_mask)
                split = visual.shape[-2]
                visual, text = visual + both[..., :split, :], both[..., split:, :]
            else:
                text = layer(text, key_padding_mask=text_mask, memory=visual)
        return _one_for_each(visual, text), text


def _one_for_each(visual: Tensor, text: Tensor) -> Tensor:
    """The visual input of each text: a view, without a copy."""
    if visual.dim() == text.dim():
        return visual
    return visual[:, None].expand(-1, text.shape[1], -1, -1)

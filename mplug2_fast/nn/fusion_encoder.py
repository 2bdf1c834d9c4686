"""The fusion encoder: text attends to an image or a video."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mplug2_fast.nn.bert_layer import BertLayer, can_pack
from mplug2_fast.nn.packing import Packing
from mplug2_fast.nn.unchanged import unchanged

CONNECTED_TOKENS = 8192
"""Visual and text tokens that connected layers hold at once."""


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
                keys and values of cross-attention. After a connected layer, each text has its own visual input.
            text_mask: `(B, tokens)` or `(B, texts, tokens)`, 1 for tokens and 0 for padding.
            visual: `(B, S, D)`; all of it is seen.
        """
        return self._run(text, text_mask, visual, 0)

    def can_pack(self) -> bool:
        """Whether `first_tokens` computes what `forward` does."""
        return unchanged(frozenset((type(self),)), self) and can_pack(*self.layers)

    def first_tokens(self, text: Tensor, text_mask: Tensor, visual: Tensor) -> Tensor:
        """The first token that `forward` gives for each of many texts of one visual input, `(texts, D)`. For inference.

        Padding is not computed, nor the other tokens of the last layer.

        Args:
            text: `(texts, tokens, D)`. text_mask: `(texts, tokens)`. visual: `(S, D)`.
        """
        packing, last = Packing.of(text_mask), len(self.layers) - 1
        x, visual = packing.pack(text)[None], visual[None]
        shared = self._connected.index(True) if True in self._connected else len(self.layers)
        for n, layer in enumerate(self.layers[:shared]):
            x = layer(x, packing=packing._replace(first_only=n == last), memory=visual)
        if shared <= last:
            heads = self.layers[shared].attention.self.project(visual)
            parts = (self._apart(group.of(x[0]), group.mask, visual, heads, shared) for group in packing.groups)
            x = torch.cat([part for group in parts for part in group])[None]
        return packing.restore(x[0])

    def _apart(
        self, text: Tensor, mask: Tensor | None, visual: Tensor, heads: tuple[Tensor, ...], connected: int
    ) -> Iterator[Tensor]:
        """The first tokens of texts of one length `(texts, tokens, D)`, from the first connected layer on.

        Args:
            visual: `(1, S, D)`, the same for all texts before this layer. heads: its queries, keys and values.
            connected: number of the layer.
        """
        mask = text.new_ones(text.shape[:2]) if mask is None else mask
        layer, split = self.layers[connected], visual.shape[1]
        own = layer.attention
        texts = max(1, CONNECTED_TOKENS // (split + text.shape[1]))
        for some, seen in zip(text.split(texts), mask.split(texts), strict=True):
            states = _joined(visual, some)
            both = [_joined(*pair) for pair in zip(heads, own.self.project(some), strict=True)]
            both_mask = torch.cat([seen.new_ones(len(seen), split), seen], dim=1)
            result = layer.feed_forward(own.output(own.self.context(*both, key_padding_mask=both_mask), states))
            yield self._run(result[:, split:], seen, visual + result[:, :split], connected + 1)[1][:, 0]

    def _run(self, text: Tensor, text_mask: Tensor, visual: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """`forward` from layer `start` on."""
        for layer, connected in zip(self.layers[start:], self._connected[start:], strict=True):
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


def _joined(visual: Tensor, text: Tensor) -> Tensor:
    """One visual input `(1, S, ...)` in front of each text `(texts, tokens, ...)`."""
    return torch.cat([visual.expand(len(text), *visual.shape[1:]), text], dim=1)

"""Universal layers, text encoder and fusion encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mplug2_fast.models.mplug2.config import TextConfig
from mplug2_fast.nn.bert_layer import BERT_KINDS, BertEmbeddings, BertLayer
from mplug2_fast.nn.unchanged import unchanged


class UniversalLayers(nn.Module):
    """The layers that text and video share: for a video, into learned latents and back onto all tokens."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.num_latents, config.hidden_size))
        self.first = BertLayer.from_config(config, fused_projections=True)
        self.last = BertLayer.from_config(config, fused_projections=True)

    def forward(self, visual: Tensor) -> Tensor:
        """Visual tokens `(B, S, D)` to `(B, S, D)`."""
        first, batch = self.first, visual.shape[0]
        if not self._shares_latents():
            latents = first(self.latents.expand(batch, -1, -1), memory=visual)
            return self.last(visual, memory=latents)
        # Until they attend to the video, the latents are the same for all videos: compute that part once.
        latents, cross = first.attention(self.latents[None]), first.crossattention
        query = cross.self.project_query(latents).expand(batch, -1, -1, -1)
        context = cross.self.context(query, *cross.self.project_memory(visual))
        latents = cross.output(context, latents.expand(batch, -1, -1))
        return self.last(visual, memory=first.feed_forward(latents))

    def _shares_latents(self) -> bool:
        """Whether the modules that the latents pass before they attend to the video are unchanged."""
        first, kinds = self.first, BERT_KINDS
        if not unchanged(kinds, first) or not unchanged(kinds, first.attention, first.crossattention):
            return False
        return unchanged(kinds, *first.attention.modules(), first.crossattention.self)


class TextEncoder(nn.Module):
    """Embeddings and text-only layers; the universal layers follow as plain self-attention layers."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.layers = nn.ModuleList(
            [
                BertLayer.from_config(config, cross_attention=False, fused_projections=True)
                for _ in range(config.text_encoder_layers - config.num_uni_layer)
            ]
        )

    def forward(self, input_ids: Tensor, mask: Tensor, universal: UniversalLayers) -> Tensor:
        """input_ids and mask `(B, tokens)` to `(B, tokens, D)`."""
        x = self.embeddings(input_ids)
        for layer in (*self.layers, universal.first, universal.last):
            x = layer(x, key_padding_mask=mask)
        return x


class FusionEncoder(nn.Module):
    """Text meets video: cross-attention layers, and every `stride_layer` a connected layer over both together."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self._connected = [config.connected(n) for n in range(config.fusion_layers)]
        self.layers = nn.ModuleList(
            [
                BertLayer.from_config(config, cross_attention=not connected, fused_projections=True)
                for connected in self._connected
            ]
        )

    def forward(self, text: Tensor, text_mask: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """text `(B, tokens, D)`, its mask `(B, tokens)`, visual `(B, S, D)`, all of it seen. Returns (visual, text)."""
        split = visual.shape[1]
        for layer, connected in zip(self.layers, self._connected, strict=True):
            if connected:
                both_mask = torch.cat([text_mask.new_ones(visual.shape[:2]), text_mask], dim=1)
                both = layer(torch.cat([visual, text], dim=1), key_padding_mask=both_mask)
                visual, text = visual + both[:, :split], both[:, split:]
            else:
                text = layer(text, key_padding_mask=text_mask, memory=visual)
        return visual, text

"""Universal layers and text encoder."""

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

    def forward(self, input_ids: Tensor, mask: Tensor, universal: UniversalLayers | None) -> Tensor:
        """input_ids and mask `(B, tokens)` to `(B, tokens, D)`; None for universal layers ends before them."""
        x = self.embeddings(input_ids)
        for layer in (*self.layers, *((universal.first, universal.last) if universal is not None else ())):
            x = layer(x, key_padding_mask=mask)
        return x

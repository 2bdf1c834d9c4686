"""Universal layers and text encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mplug2_fast.models.mplug2.config import TextConfig
from mplug2_fast.nn.bert_layer import BERT_KINDS, BertEmbeddings, BertLayer
from mplug2_fast.nn.unchanged import unchanged


class UniversalLayers(nn.Module):
    """The layers that text and video share: for a video, into learned latents and back onto all tokens.

    Attributes:
        layers: any number. All but the last bring the visual tokens into the latents; the last one brings the latents
            back. One layer alone attends to the latents as they are. Without a layer, a video gets nothing.
        latents: `(num_latents, D)`, or None without a layer.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        count = config.num_uni_layer
        self.latents = nn.Parameter(torch.empty(config.num_latents, config.hidden_size)) if count else None
        self.layers = nn.ModuleList([BertLayer.from_config(config, fused_projections=True) for _ in range(count)])

    def forward(self, visual: Tensor) -> Tensor | None:
        """Visual tokens `(B, S, D)` to `(B, S, D)`, or None without a layer."""
        if self.latents is None:
            return None
        latents, batch = self.latents.expand(visual.shape[0], -1, -1), visual.shape[0]
        *inward, last = self.layers
        if inward and self._shares_latents():
            # Until they attend to the video, the latents are the same for all videos: compute that part once.
            first = inward.pop(0)
            own, cross = first.attention(self.latents[None]), first.crossattention
            query = cross.self.project_query(own).expand(batch, -1, -1, -1)
            context = cross.self.context(query, *cross.self.project_memory(visual))
            latents = first.feed_forward(cross.output(context, own.expand(batch, -1, -1)))
        for layer in inward:
            latents = layer(latents, memory=visual)
        return last(visual, memory=latents)

    def _shares_latents(self) -> bool:
        """Whether the modules that the latents pass before they attend to the video are unchanged."""
        first, kinds = self.layers[0], BERT_KINDS
        if not unchanged(kinds, first) or not unchanged(kinds, first.attention, first.crossattention):
            return False
        return unchanged(kinds, *first.attention.modules(), first.crossattention.self)


class TextEncoder(nn.Module):
    """Embeddings and text-only layers; the universal layers follow as plain self-attention layers.

    Layers that are not shared are the text's own.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.layers = nn.ModuleList(
            [
                BertLayer.from_config(config, cross_attention=False, fused_projections=True)
                for _ in range(config.text_encoder_layers - (config.num_uni_layer if config.share_universal else 0))
            ]
        )

    def forward(self, input_ids: Tensor, mask: Tensor, universal: UniversalLayers | None) -> Tensor:
        """input_ids and mask `(B, tokens)` to `(B, tokens, D)`; None for universal layers ends before them."""
        x = self.embeddings(input_ids)
        for layer in (*self.layers, *(() if universal is None else universal.layers)):
            x = layer(x, key_padding_mask=mask)
        return x

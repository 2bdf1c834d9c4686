"""Text encoder with the universal layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mplug2_fast.models.mplug2.config import TextConfig
from mplug2_fast.reference.bert import BertEmbeddings, BertEncoder, BertLayer, self_attention_mask


class TextEncoder(nn.Module):
    """BERT whose last layers are universal: plain self-attention layers for text, `v_module` for a video.

    Args:
        text: False leaves out what only a text needs, the embeddings and the layers below the universal ones.
    """

    def __init__(self, config: TextConfig, *, text: bool) -> None:
        super().__init__()
        shared = config.num_uni_layer if config.share_universal else 0
        first_universal = config.text_encoder_layers - shared
        if text:
            self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(
            {
                i: BertLayer(
                    config,
                    cross_attention=i >= first_universal,
                    num_latents=config.num_latents if i == first_universal else 0,
                )
                for i in range(0 if text else first_universal, config.text_encoder_layers)
            }
        )
        self.universal = [str(i) for i in range(first_universal, config.text_encoder_layers)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embeddings(input_ids)
        mask = self_attention_mask(attention_mask, x.dtype)
        for layer in self.encoder.layer.values():
            x = layer(x, mask)
        return x

    def v_module(self, visual: Tensor) -> Tensor:
        """Visual tokens `(B, S, D)` through the universal layers: into the latents, and back onto all tokens."""
        return v_module([self.encoder.layer[index] for index in self.universal], visual)


def v_module(layers: Sequence[nn.Module], visual: Tensor) -> Tensor:
    """Into the latents of the first layer, and back onto all tokens with the last."""
    latents = layers[0].latents.expand(visual.shape[0], -1, -1)
    for layer in layers[:-1]:
        latents = layer(latents, memory=visual)
    return layers[-1](visual, memory=latents)


class UnsharedLayers(BertEncoder):
    """Universal layers of the video alone."""

    def __init__(self, config: TextConfig) -> None:
        latents = [config.num_latents, *[0] * (config.num_uni_layer - 1)]
        super().__init__({i: BertLayer(config, cross_attention=True, num_latents=n) for i, n in enumerate(latents)})

    def v_module(self, visual: Tensor) -> Tensor:
        return v_module(list(self.layer.values()), visual)

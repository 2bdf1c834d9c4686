"""mPLUG. A model has the modules that its tasks need."""

from __future__ import annotations

from torch import Tensor, nn

from mplug2_fast.models.model import Model
from mplug2_fast.models.mplug.config import MPlugConfig, TextConfig
from mplug2_fast.models.mplug.official_names import MPlugNames
from mplug2_fast.models.names import DECODER, FUSION, TEXT, VISION, OfficialNames
from mplug2_fast.nn import LayerNorm
from mplug2_fast.nn.bert_layer import BertEmbeddings, BertLayer
from mplug2_fast.nn.fusion_encoder import FusionEncoder
from mplug2_fast.nn.parts import linear
from mplug2_fast.nn.text_decoder import TextDecoder
from mplug2_fast.nn.vision_transformer import ImageEncoder


class TextEncoder(nn.Module):
    """BERT's embeddings and self-attention layers."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.layers = nn.ModuleList(
            [
                BertLayer.from_config(config, cross_attention=False, fused_projections=True)
                for _ in range(config.text_encoder_layers)
            ]
        )

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """input_ids and mask `(B, tokens)` to `(B, tokens, D)`."""
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x, key_padding_mask=mask)
        return x


class MPlug(Model):
    """An mPLUG model with exactly the modules that its tasks need: see `Model`.

    A video is its frames, each encoded alone; an image is a video of one frame.
    """

    family = MPlugConfig.family

    def _add_modules(self, config: MPlugConfig, needed: frozenset[str]) -> None:
        text = config.text
        self.dropout = nn.Dropout(text.hidden_dropout_prob)
        if VISION in needed:
            self.visual = ImageEncoder(config.vision, config.vision.attention_dropout)
            self.visual_projection = self.visual_projection_norm = None
            if config.vision.width != text.hidden_size:
                self.visual_projection = nn.Linear(config.vision.width, text.hidden_size)
                self.visual_projection_norm = LayerNorm(text.hidden_size, eps=1e-12)
        if TEXT in needed:
            self.text = TextEncoder(text)
        if FUSION in needed:
            self.fusion = FusionEncoder(text)
        if DECODER in needed:
            self.decoder = TextDecoder(text, text.text_decode_layers)

    def _names(self) -> OfficialNames:
        return MPlugNames(self.config, self.module_names)

    def encode_text(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        return self.text(input_ids, mask)

    def visual_features(self, image_embeds: Tensor) -> Tensor:
        return self.contrast.visual(self._class_tokens(image_embeds))

    def pooled(self, image_embeds: Tensor) -> Tensor:
        """The class token of an image, or the mean of a video's."""
        return self._class_tokens(image_embeds).mean(dim=1)

    def _class_tokens(self, image_embeds: Tensor) -> Tensor:
        """The class token of each frame `(B, T, D)`."""
        return image_embeds[:, :: 1 + self.config.vision.num_patches]

    def _visual(self, video: Tensor) -> Tensor:
        x = self.visual(video)
        if self.visual_projection is not None:
            x = self.dropout(self.visual_projection_norm(linear(self.visual_projection, x)))
        return x

    def _image_embeds(self, video: Tensor) -> Tensor:
        return self._visual(video)

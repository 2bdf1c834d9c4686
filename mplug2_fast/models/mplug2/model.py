"""mPLUG-2. A model has the modules that its tasks need."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from mplug2_fast.models.model import Fused, Model
from mplug2_fast.models.mplug2.config import CLIP, FUSION_MLM, TEXT_MLM, UNIVERSAL, MPlug2Config
from mplug2_fast.models.mplug2.encoders import TextEncoder, UniversalLayers
from mplug2_fast.models.mplug2.official_names import MPlug2Names
from mplug2_fast.models.names import DECODER, FUSION, TEXT, VISION, OfficialNames
from mplug2_fast.nn import LayerNorm
from mplug2_fast.nn.clip_text import ClipText
from mplug2_fast.nn.fusion_encoder import FusionEncoder
from mplug2_fast.nn.layer_norm import norm_of_sum
from mplug2_fast.nn.parts import linear
from mplug2_fast.nn.text_decoder import TextDecoder
from mplug2_fast.nn.vision_transformer import VisionTransformer
from mplug2_fast.nn.word_head import WordHead

__all__ = ["Fused", "MPlug2"]


ImageAs = Literal["single", "clip", "frame"]


class MPlug2(Model):
    """An mPLUG-2 model with exactly the modules that its tasks need: see `Model`."""

    family = MPlug2Config.family

    def _add_modules(self, config: MPlug2Config, needed: frozenset[str]) -> None:
        text = config.text
        self.dropout = nn.Dropout(text.hidden_dropout_prob)
        if VISION in needed:
            self.visual = VisionTransformer(config.vision)
            self.visual_projection = self.visual_projection_norm = None
            if config.vision.width != text.hidden_size:
                self.visual_projection = nn.Linear(config.vision.width, text.hidden_size)
                self.visual_projection_norm = LayerNorm(text.hidden_size, eps=1e-12)
            self.visual_norm = LayerNorm(text.hidden_size, eps=1e-12)
        if UNIVERSAL in needed:
            self.universal = UniversalLayers(text)
        if TEXT in needed:
            self.text = TextEncoder(text)
        if FUSION in needed:
            self.fusion = FusionEncoder(text)
        if CLIP in needed:
            self.clip = ClipText(config.clip, config.vision.width)
        if TEXT_MLM in needed:
            self.text_mlm = WordHead(text)
        if FUSION_MLM in needed:
            self.fusion_mlm = WordHead(text)
        if DECODER in needed:
            self.decoder = TextDecoder(text, text.text_decode_layers)

    def _names(self) -> OfficialNames:
        return MPlug2Names(self.config, self.module_names)

    def encode_image(self, image: Tensor, image_as: ImageAs = "single") -> Tensor:
        """Image `(B, 3, H, W)`, normalised, to image_embeds `(B, S, D)`.

        Args:
            image: as frames of videos.
            image_as: "single": one frame. "clip": a video that shows the image `num_frames` times, for models
                that were trained on videos alone. "frame": one frame without the temporal modules, for models that were
                trained on images in this way (mPLUG-2, figure 2b).

        Raises:
            ValueError: a wrong shape, or no such way.
        """
        if image_as not in ("single", "clip", "frame"):
            raise ValueError(f"image_as must be single, clip or frame, got {image_as!r}")
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"image must be (batch, 3, height, width), got {tuple(image.shape)}")
        video = image[:, :, None]
        if image_as == "clip":
            video = video.expand(-1, -1, self.config.vision.num_frames, -1, -1)
        return self._encode(self._frame_embeds if image_as == "frame" else self._image_embeds, video)

    def encode_text(self, input_ids: Tensor, mask: Tensor, *, universal: bool = True) -> Tensor:
        """input_ids and mask `(B, tokens)`, mask 1 for tokens and 0 for padding, to `(B, tokens, D)`.

        `universal=False` gives the text before the universal layers, if they are shared.
        """
        shared = self.config.text.share_universal
        return self.text(input_ids, mask, self.universal if universal and shared else None)

    def visual_features(self, image_embeds: Tensor) -> Tensor:
        return self.contrast.visual(self.pooled(image_embeds))

    def pooled(self, image_embeds: Tensor) -> Tensor:
        return image_embeds[:, 0]

    def _visual(self, video: Tensor, **options: bool) -> Tensor:
        x = self.visual(video, **options)
        if self.visual_projection is not None:
            x = self.dropout(self.visual_projection_norm(linear(self.visual_projection, x)))
        return x

    def _image_embeds(self, video: Tensor, **options: bool) -> Tensor:
        x = self._visual(video, **options)
        update = self.universal(x)
        return self.dropout(self.visual_norm(x) if update is None else norm_of_sum(self.visual_norm, x, update))

    def _frame_embeds(self, video: Tensor) -> Tensor:
        return self._image_embeds(video, temporal=False)

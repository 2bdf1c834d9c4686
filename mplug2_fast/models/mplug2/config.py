"""Sizes and defaults of mPLUG-2: presets, and what the official configuration files say."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mplug2_fast.errors import ConfigError
from mplug2_fast.models.config import Config
from mplug2_fast.nn.config import BertConfig, VisionConfig

CLS_TOKEN_ID = 101
SEP_TOKEN_ID = 102
PAD_TOKEN_ID = 0

CLIP_TOWERS = {"ViT-L-14": (1024, 24, 14), "ViT-B-16": (768, 12, 16)}
"""Image towers in the official configurations: name to (width, layers, patch size)."""

MAX_IMAGE_SIDE = 400
"""Patches along one side of a frame."""


@dataclass(frozen=True)
class TextConfig(BertConfig):
    """The BERT layers of mPLUG-2: text encoder with its universal layers, fusion encoder, decoder."""

    stored_layers: int = 24
    """Layers that a checkpoint stores in the fusion encoder; the last `fusion_layers` of them run."""
    text_encoder_layers: int = 24
    num_uni_layer: int = 2
    num_latents: int = 50
    fusion_layers: int = 6
    stride_layer: int = 1000
    text_decode_layers: int = 12

    def connected(self, n: int) -> bool:
        """Whether fusion layer n, from 0 among those that run, attends over [visual; text] together.

        mPLUG's cross-modal skip-connection (arXiv 2205.12005); such a layer has no use for its cross-attention.
        """
        return n > 0 and n % self.stride_layer == 0


@dataclass(frozen=True)
class GenerationConfig:
    """Defaults of `generate`. A length of None means the official default of the task."""

    num_beams: int = 5
    min_length: int | None = None
    max_length: int | None = None
    prompt: str = ""
    prompt_length: int | None = None
    """Tokens of the prompt without [CLS]. None counts words and punctuation marks, which is exact if the vocabulary
    holds each of them whole. It holds those of the official prompt."""

    @property
    def prompt_tokens(self) -> int:
        """Number of targets after [CLS] that the captioning loss ignores: all tokens of the prompt but the last.

        The official code ignores positions 0 to prompt_length - 1 of the input ids. Position 0 is [CLS], which is no
        target, so the last token of the prompt is learned.
        """
        counted = len(re.findall(r"\w+|[^\w\s]", self.prompt)) if self.prompt_length is None else self.prompt_length
        return max(counted - 1, 0)


@dataclass(frozen=True)
class MPlug2Config(Config):
    """The sizes of an mPLUG-2 model, and its defaults for generation.

    Raises `ConfigError` for sizes that no model can have.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    family: ClassVar[str] = "mplug2"

    def __post_init__(self) -> None:
        super().__post_init__()
        vision, text = self.vision, self.text
        if vision.width % vision.head_dim:
            raise ConfigError(
                f"the vision width {vision.width} is not a multiple of the head dimension {vision.head_dim}"
            )
        if text.hidden_size % text.num_attention_heads:
            raise ConfigError(
                f"hidden_size {text.hidden_size} is not a multiple of num_attention_heads {text.num_attention_heads}"
            )
        if vision.image_size % vision.patch_size:
            raise ConfigError(
                f"image_size {vision.image_size} is not a multiple of the patch size {vision.patch_size}: "
                f"use {vision.image_size // vision.patch_size * vision.patch_size}"
            )
        if vision.image_size > MAX_IMAGE_SIDE * vision.patch_size:
            raise ConfigError(
                f"image_size {vision.image_size} is more than {MAX_IMAGE_SIDE} patches of {vision.patch_size} pixels"
            )
        if vision.temporal_reduction > vision.width:
            raise ConfigError(
                f"temporal_reduction {vision.temporal_reduction} leaves nothing of the vision width {vision.width}"
            )
        if vision.temporal_kernel_size % 2 == 0:
            raise ConfigError(f"temporal_kernel_size must be odd, got {vision.temporal_kernel_size}")
        if text.num_uni_layer != 2:
            raise ConfigError(
                f"num_uni_layer {text.num_uni_layer} is not known: mPLUG-2 has a first and a last universal layer"
            )
        if text.text_encoder_layers < text.num_uni_layer:
            raise ConfigError(
                f"text_encoder_layers {text.text_encoder_layers} includes the num_uni_layer "
                f"{text.num_uni_layer} universal layers and cannot be smaller"
            )
        if text.fusion_layers > text.stored_layers:
            raise ConfigError(f"fusion_layers {text.fusion_layers} is more than the stored layers {text.stored_layers}")
        if text.num_uni_layer > text.text_decode_layers:
            raise ConfigError(
                f"text_decode_layers {text.text_decode_layers} is less than num_uni_layer {text.num_uni_layer}"
            )

    @classmethod
    def from_official(
        cls,
        *,
        bert: Mapping[str, Any],
        model: Mapping[str, Any] | None = None,
        clip: Mapping[str, Any] | None = None,
    ) -> MPlug2Config:
        """Read the official files: `config_bert*.json`, the task's YAML, and the CLIP sizes.

        Args:
            bert: the BERT JSON.
            model: the YAML fields; absent ones have the official default.
            clip: `width`, `layers` and `patch` of the image tower. None takes them from the YAML's `clip_name`.
        """
        model = dict(model or {})
        if clip is None:
            name = model.get("clip_name", "ViT-L-14")
            if name not in CLIP_TOWERS:
                raise ConfigError(
                    f"clip_name {name!r} is not one of {', '.join(CLIP_TOWERS)}: "
                    "pass clip, a dict of width, layers and patch"
                )
            clip = dict(zip(("width", "layers", "patch"), CLIP_TOWERS[name], strict=True))
        missing = [key for key in ("width", "layers", "patch") if key not in clip]
        if missing:
            raise ConfigError(f"clip lacks {', '.join(missing)}")
        names = {f.name for f in dataclasses.fields(TextConfig)}
        text = {key: value for key, value in bert.items() if key in names}
        text["stored_layers"] = bert.get("num_hidden_layers", TextConfig.stored_layers)
        return cls(
            VisionConfig(
                width=clip["width"],
                layers=clip["layers"],
                patch_size=clip["patch"],
                image_size=model.get("image_res", 224),
                num_frames=model.get("model_num_frames", 16),
                temporal_downsampling=bool(model.get("temporal_downsampling", False)),
                temporal_stride=model.get("temporal_stride", 2),
            ),
            TextConfig(**text),
            GenerationConfig(
                num_beams=model.get("beam_size", 5),
                min_length=model.get("min_length"),
                max_length=model.get("max_length"),
                prompt=model.get("prompt", ""),
                prompt_length=model.get("prompt_length"),
            ),
        )

    from_released = from_official
    """The former name."""


_LARGE = (VisionConfig(), TextConfig(), GenerationConfig(prompt="a video of"))
_BASE = (
    VisionConfig(width=768, layers=12, patch_size=16),
    TextConfig(
        hidden_size=768,
        num_attention_heads=12,
        intermediate_size=3072,
        stored_layers=12,
        text_encoder_layers=12,
        fusion_layers=3,
        stride_layer=100,
    ),
    GenerationConfig(prompt="a video of"),
)
_TINY = (
    VisionConfig(width=128, layers=3, patch_size=8, image_size=32, num_frames=4),
    TextConfig(
        hidden_size=128,
        num_attention_heads=2,
        intermediate_size=256,
        vocab_size=256,
        max_position_embeddings=32,
        stored_layers=2,
        text_encoder_layers=3,
        fusion_layers=2,
        text_decode_layers=2,
        num_latents=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
    GenerationConfig(min_length=1, max_length=12),
)

MPlug2Config.presets = {"large": _LARGE, "base": _BASE, "tiny": _TINY}

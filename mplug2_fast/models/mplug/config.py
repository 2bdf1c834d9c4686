"""Sizes and defaults of mPLUG: presets, and what the official configuration files say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mplug2_fast.images.preparation import MPLUG, MPlugGrounding
from mplug2_fast.models.config import Config, ContrastConfig, GenerationConfig, check_towers
from mplug2_fast.models.mplug.wording import MPlugWording
from mplug2_fast.models.names import SHARED_MODULES
from mplug2_fast.models.wording import Wording
from mplug2_fast.nn.config import StacksConfig, TowerConfig
from mplug2_fast.video.preparation import Preparation

ATTENTION_DROPOUT = 0.1
"""Of the image tower in training."""


@dataclass(frozen=True)
class ImageConfig(TowerConfig):
    """Sizes of the vision encoder: CLIP's image tower. A video has `num_frames`, an image one."""

    image_size: int = 336
    num_frames: int = 1
    attention_dropout: float = ATTENTION_DROPOUT


@dataclass(frozen=True)
class TextConfig(StacksConfig):
    """The BERT layers of mPLUG."""

    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    stored_layers: int = 12
    text_encoder_layers: int = 6
    fusion_layers: int = 6
    stride_layer: int = 6
    text_decode_layers: int = 12


@dataclass(frozen=True)
class MPlugConfig(Config):
    """The sizes of an mPLUG model, and its defaults for generation.

    Raises `ConfigError` for sizes that no model can have.
    """

    vision: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)

    family: ClassVar[str] = "mplug"
    title: ClassVar[str] = "mPLUG"
    modules: ClassVar[tuple[str, ...]] = SHARED_MODULES
    lengths: ClassVar = {"captioning": (8, 25)}
    wording: ClassVar[Wording] = MPlugWording()
    official_vision: ClassVar = {"image_size": "image_res", "num_frames": "num_frm_test"}

    @property
    def preparation(self) -> Preparation:
        return MPLUG

    @property
    def grounding_preparation(self) -> Preparation:
        return MPlugGrounding(self.vision.image_size)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_towers(self.vision, self.text)


_TINY = (
    ImageConfig(width=128, layers=3, patch_size=8, image_size=48, num_frames=1, attention_dropout=0.0),
    TextConfig(
        hidden_size=128,
        num_attention_heads=2,
        intermediate_size=256,
        vocab_size=256,
        max_position_embeddings=64,
        stored_layers=4,
        text_encoder_layers=2,
        fusion_layers=4,
        stride_layer=3,
        text_decode_layers=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
    GenerationConfig(min_length=1, max_length=40),
    ContrastConfig(64),
)
_BASE = (ImageConfig(width=768, layers=12, patch_size=16, image_size=384), TextConfig(stride_layer=3))
_LARGE = (ImageConfig(), TextConfig())

MPlugConfig.presets = {"large": _LARGE, "base": _BASE, "tiny": _TINY}

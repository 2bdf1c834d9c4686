"""Sizes and defaults of mPLUG-2: presets, and what the official configuration files say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from mplug2_fast.errors import ConfigError
from mplug2_fast.models.config import Config, ContrastConfig, GenerationConfig, check_towers
from mplug2_fast.models.names import SHARED_MODULES, TEXT, VISION
from mplug2_fast.models.wording import Wording
from mplug2_fast.nn.config import StacksConfig, VisionConfig

UNIVERSAL = "universal"
"""The layers that text and video share, which both need."""

CLIP = "clip"
"""CLIP's text tower and its projections."""

TEXT_MLM, FUSION_MLM = "text_mlm", "fusion_mlm"
"""Heads that predict masked words, of a text alone and after fusion. The word embeddings are the text encoder's."""


@dataclass(frozen=True)
class TextConfig(StacksConfig):
    """The BERT layers of mPLUG-2: text encoder with its universal layers, fusion encoder, decoder."""

    num_uni_layer: int = 2
    """Universal layers, from 0. `text_encoder_layers` includes them."""
    num_latents: int = 50
    share_universal: bool = True
    """Whether text and video share the universal layers, or have as many each."""


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of CLIP's text tower. The defaults are those of CLIP's ViT-L/14."""

    token_width: int = 768
    token_layers: int = 12
    token_heads: int = 12
    bpe_size: int = 49408
    context_length: int = 77
    joint_dim: int = 768


@dataclass(frozen=True)
class MPlug2Config(Config):
    """The sizes of an mPLUG-2 model, and its defaults for generation.

    Raises `ConfigError` for sizes that no model can have.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    # Not in the repr, because bulk runs identify their model by it, and older runs do not have this field.
    clip: ClipConfig = field(default_factory=ClipConfig, repr=False)

    family: ClassVar[str] = "mplug2"
    title: ClassVar[str] = "mPLUG-2"
    modules: ClassVar[tuple[str, ...]] = (*SHARED_MODULES, UNIVERSAL, CLIP, TEXT_MLM, FUSION_MLM)
    implied: ClassVar = {VISION: frozenset({UNIVERSAL}), TEXT: frozenset({UNIVERSAL})}
    wording: ClassVar[Wording] = Wording()
    official_vision: ClassVar = {
        "image_size": "image_res",
        "num_frames": "model_num_frames",
        "temporal_downsampling": "temporal_downsampling",
        "temporal_stride": "temporal_stride",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        vision, text = self.vision, self.text
        check_towers(vision, text)
        if vision.temporal_reduction > vision.width:
            raise ConfigError(
                f"temporal_reduction {vision.temporal_reduction} leaves nothing of the vision width {vision.width}"
            )
        if vision.temporal_kernel_size % 2 == 0:
            raise ConfigError(f"temporal_kernel_size must be odd, got {vision.temporal_kernel_size}")
        if self.clip.token_width % self.clip.token_heads:
            raise ConfigError(
                f"token_width {self.clip.token_width} is not a multiple of token_heads {self.clip.token_heads}"
            )
        if text.text_encoder_layers < text.num_uni_layer:
            raise ConfigError(
                f"text_encoder_layers {text.text_encoder_layers} includes the num_uni_layer "
                f"{text.num_uni_layer} universal layers and cannot be smaller"
            )
        if text.num_uni_layer > text.text_decode_layers:
            raise ConfigError(
                f"text_decode_layers {text.text_decode_layers} is less than num_uni_layer {text.num_uni_layer}"
            )

    def visual_tokens(self, num_frames: int) -> int:
        return 1 + super().visual_tokens(self.vision.output_frames(num_frames))

    @classmethod
    def from_released(cls, **files: Any) -> MPlug2Config:
        """The former name of `from_official`."""
        return cls.from_official(**files)


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

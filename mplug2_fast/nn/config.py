"""Sizes of the vision transformer and of BERT layers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TowerConfig:
    """Sizes of a CLIP image tower that encodes the frames of a video."""

    width: int = 1024
    layers: int = 24
    patch_size: int = 14
    image_size: int = 224
    num_frames: int = 16
    head_dim: int = 64
    mlp_ratio: int = 4
    layer_norm_eps: float = 1e-5

    @property
    def num_heads(self) -> int:
        return self.width // self.head_dim

    @property
    def num_patches(self) -> int:
        """Patches per frame, L."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """Sizes of mPLUG-2's vision encoder: an image tower with two local temporal modules per block."""

    temporal_kernel_size: int = 3
    temporal_reduction: int = 2
    temporal_downsampling: bool = False
    temporal_stride: int = 2

    def output_frames(self, num_frames: int) -> int:
        """Frames inside the encoder for `num_frames` input frames."""
        return (num_frames - 1) // self.temporal_stride + 1 if self.temporal_downsampling else num_frames


@dataclass(frozen=True)
class BertConfig:
    """Sizes that all BERT layers of a model share."""

    hidden_size: int = 1024
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class StacksConfig(BertConfig):
    """The BERT layers of a text encoder, a fusion encoder and a decoder."""

    stored_layers: int = 24
    """Layers that a checkpoint stores in the fusion encoder; the last `fusion_layers` of them run."""
    text_encoder_layers: int = 24
    fusion_layers: int = 6
    stride_layer: int = 1000
    text_decode_layers: int = 12

    def connected(self, n: int) -> bool:
        """Whether fusion layer n, from 0 among those that run, attends over [visual; text] together.

        mPLUG's cross-modal skip-connection (arXiv 2205.12005); such a layer has no use for its cross-attention.
        """
        return n > 0 and n % self.stride_layer == 0

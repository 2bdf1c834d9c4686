"""The memory that a clip takes in an mPLUG model."""

from __future__ import annotations

from mplug2_fast.models.mplug.config import MPlugConfig


def clip_bytes(config: MPlugConfig, *, num_frames: int, itemsize: int, num_beams: int = 1, max_length: int = 1) -> int:
    """An estimate of the memory that the model takes for a clip at its peak, without its weights.

    Args:
        config: the model's. num_frames: of a clip. itemsize: bytes of a number in the model's dtype.
        num_beams, max_length: of the search; 1 where words are not generated.
    """
    vision, text = config.vision, config.text
    tokens = num_frames * (1 + vision.num_patches)
    pixels = 3 * num_frames * vision.image_size**2
    # A block holds its input, the normalised input, and four times as much within the MLP, with another for the result;
    # before the first one, pixels are there twice. A connected fusion layer holds as many values of its own width.
    encoding = (3 + vision.mlp_ratio) * tokens * max(vision.width, text.hidden_size) + 2 * pixels
    layers, hidden = text.text_decode_layers, text.hidden_size
    memory = 2 * layers * hidden * (tokens + num_beams * max_length) + 2 * tokens * hidden
    logits = 4 * num_beams * text.vocab_size * 4 // itemsize  # in float32, and what choosing the best makes of them
    return itemsize * (encoding + memory + logits)

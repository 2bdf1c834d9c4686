"""The memory that the model needs for a clip."""

from __future__ import annotations

from typing import Any

import torch

from mplug2_fast.errors import ConfigError
from mplug2_fast.info import total_memory


def clip_bytes(config: Any, *, num_frames: int, itemsize: int, num_beams: int = 1, max_length: int = 1) -> int:
    """Estimates the model's peak memory for a clip, without its weights.

    Args:
        config: the model's. num_frames: of a clip. itemsize: bytes of a number in the model's dtype.
        num_beams, max_length: of the search; 1 where no text is generated.
    """
    vision, text = config.vision, config.text
    tokens = config.visual_tokens(num_frames)
    pixels = 3 * num_frames * vision.image_size**2
    # A block keeps its input, the normalised input, its result, and the hidden values of the MLP. A connected fusion
    # layer keeps the same tensors at the text's width. The first block starts with two copies of the pixels in memory.
    encoding = (3 + vision.mlp_ratio) * tokens * max(vision.width, text.hidden_size) + 2 * pixels
    # Each layer of the decoder keeps keys and values of the tokens, and those of the words of each beam.
    layers, hidden = text.text_decode_layers, text.hidden_size
    memory = 2 * layers * hidden * (tokens + num_beams * max_length) + 2 * tokens * hidden
    logits = 4 * num_beams * text.vocab_size * 4 // itemsize  # in float32, and the tensors of choosing the best
    return itemsize * (encoding + memory + logits)


def require_memory(what: str, needed: int, device: torch.device) -> None:
    """Raises `ConfigError` if a clip needs more than the whole memory of the device."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else total_memory()
    if needed > total:
        clip, most = (f"{number / 2**30:,.1f} GiB" for number in (needed, total))
        raise ConfigError(f"{what}: a clip takes about {clip} of memory, and {device} has {most}: take fewer")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out. On a CPU, PyTorch raises a plain `RuntimeError`."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)

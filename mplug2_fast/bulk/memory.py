"""How many clips the model computes at a time, by the memory that they take."""

from __future__ import annotations

import torch

from mplug2_fast.config import MPlug2Config
from mplug2_fast.info import available_memory

MAX_BATCH = {"cpu": 16, "cuda": 64}
"""More clips at a time gain nothing: even the tiny model's matrix products are large enough by then."""

CPU_BUDGET = 2**30
"""Of the Large model a clip or two fit into this, and a CPU gains nothing by more of them."""

# The share of what is free that a batch may take: other programs, the allocator's gaps and the formula's error need
# room.
_SHARE = {"cpu": 0.25, "cuda": 0.6}


def clip_bytes(config: MPlug2Config, *, num_frames: int, itemsize: int, num_beams: int = 1, max_length: int = 1) -> int:
    """An estimate of the memory that the model takes for a clip at its peak, without its weights.

    Args:
        config: the model's. num_frames: of a clip. itemsize: bytes of a number in the model's dtype.
        num_beams, max_length: of the search; 1 where words are not generated.
    """
    vision, text = config.vision, config.text
    tokens = 1 + vision.output_frames(num_frames) * (1 + vision.num_patches)
    pixels = 3 * num_frames * vision.image_size**2
    # A block holds its input, the normalised input, and four times as much within the MLP, with another for the result;
    # before the first one, pixels are there twice.
    encoding = (3 + vision.mlp_ratio) * tokens * vision.width + 2 * pixels
    # Each layer of the decoder keeps keys and values of the tokens, and those of the words of each beam.
    layers, hidden = text.text_decode_layers, text.hidden_size
    memory = 2 * layers * hidden * (tokens + num_beams * max_length) + 2 * tokens * hidden
    logits = 4 * num_beams * text.vocab_size * 4 // itemsize  # in float32, and what choosing the best makes of them
    return itemsize * (encoding + memory + logits)


def batch_size(bytes_of_clip: int, device: torch.device, budget: int | None = None) -> int:
    """How many clips fit into a budget in bytes; None takes a share of what is free now. At least one."""
    if budget is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
        budget = int(free * _SHARE[device.type])
        if device.type == "cpu":
            budget = min(budget, CPU_BUDGET)
    return max(1, min(budget // bytes_of_clip, MAX_BATCH[device.type]))

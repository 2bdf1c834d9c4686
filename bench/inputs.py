"""The input: frames of a real video file, and seeded text."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mplug2_fast.errors import VideoError
from mplug2_fast.models.config import CLS_TOKEN_ID, SEP_TOKEN_ID
from mplug2_fast.ops import preprocess_frames
from mplug2_fast.video import frame_indices, load_video

DEFAULT_VIDEO = Path(__file__).resolve().parents[1] / "examples/moving_shapes/clips/red_square_moves_left.mp4"


def has_decoder() -> bool:
    return importlib.util.find_spec("av") is not None


def load(path: Path | None, frames: int, image_size: int) -> tuple[Tensor, str]:
    """Video `(3, frames, image_size, image_size)` and a description of it.

    Args:
        path: a video file, or a `.npy` of decoded frames `(frames, height, width, 3)`, uint8. None takes the bundled
            clip, or seeded noise if av is missing.

    Raises:
        VideoError: the file cannot be read, or decoding it needs av.
    """
    if path is None and not has_decoder():
        noise = torch.randn(3, frames, image_size, image_size, generator=torch.Generator().manual_seed(0))
        return noise, "seeded noise, because av is not installed (pip install av)"
    path = path or DEFAULT_VIDEO
    if path.suffix == ".npy":
        return load_array(path, frames, image_size), f"{frames} frames of {path.name}"
    if not has_decoder():
        raise VideoError(f"{path}: decoding needs av: pip install av, or pass frames as .npy")
    return load_video(path, frames, image_size), f"{frames} frames of {path.name}"


def load_array(path: Path, frames: int, image_size: int) -> Tensor:
    try:
        pixels = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise VideoError(f"{path}: {error}") from error
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise VideoError(f"{path}: expected uint8 (frames, height, width, 3), got {pixels.dtype} {pixels.shape}")
    return preprocess_frames(torch.from_numpy(pixels[frame_indices(len(pixels), frames)]), image_size)


def text(vocab_size: int, tokens: int, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Seeded ids that start with [CLS], and masks, `(batch, tokens)`. Each row is a token shorter than the one before,
    down to three quarters of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SEP_TOKEN_ID + 1, vocab_size, (batch, tokens), generator=generator)
    ids[:, 0] = CLS_TOKEN_ID
    lengths = tokens - torch.arange(batch) % (tokens // 4 + 1)
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    return ids * mask, mask

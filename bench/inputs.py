"""The input: frames of a real video file, and seeded text."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
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


def lengths(tokens: int, batch: int, shortest: int | None = None) -> list[int]:
    """Of the texts of `text`: each is a token shorter than the one before, down to `shortest`, by default three
    quarters of the tokens."""
    shortest = tokens - tokens // 4 if shortest is None else shortest
    return [tokens - row % (tokens - shortest + 1) for row in range(batch)]


def text(
    vocab_size: int, lengths: Sequence[int], seed: int, *, width: int | None = None, last: int | None = None
) -> tuple[Tensor, Tensor]:
    """Seeded ids that start with [CLS], and masks, `(texts, width)`.

    Args:
        width: with padding; None for the longest text. last: the last token of each text.
    """
    generator = torch.Generator().manual_seed(seed)
    width, ends = width or max(lengths), torch.tensor(lengths)[:, None]
    ids = torch.randint(SEP_TOKEN_ID + 1, vocab_size, (len(lengths), width), generator=generator)
    ids[:, 0] = CLS_TOKEN_ID
    if last is not None:
        ids.scatter_(1, ends - 1, last)
    mask = (torch.arange(width) < ends).long()
    return ids * mask, mask

"""Reads the model's input frames from a video."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from mplug2_fast.ops.preprocess_frames import preprocess_frames
from mplug2_fast.video.indices import frame_indices
from mplug2_fast.video.limits import Guard, Limits


def read_frames(path: str | os.PathLike[str], num_frames: int, *, limits: Limits | None = None) -> Tensor:
    """Decodes the frames of a video, or a still image, that `frame_indices` chooses.

    Frames are counted as decoding the whole file gives them, even if its header states another number. Frames are RGB,
    upright (rotated and mirrored as the file requires) and cropped as the container requires; transparency is dropped.

    Args:
        path: a file that PyAV can decode: mp4, mkv, avi, webm, gif, png, jpeg and many more.
        num_frames: number of frames, at least 1.
        limits: on time, pixels, frames and memory; None means the defaults of `Limits`.

    Returns:
        (num_frames, height, width, 3), uint8.

    Raises:
        VideoError: the file cannot be decoded, exceeds a limit, or its frames differ in size; one line,
            "<path>: <reason>".
        ValueError: `num_frames` is below 1.
        ImportError: PyAV is not installed.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, not {num_frames}")
    return torch.from_numpy(np.stack(_decode(path, num_frames, None, Guard(limits))[0]))


def load_video(
    path: str | os.PathLike[str], num_frames: int = 16, image_size: int = 224, *, limits: Limits | None = None
) -> Tensor:
    """Reads a video file, or a still image, as the model's input at test time.

    Args:
        path: a file that PyAV can decode: mp4, mkv, avi, webm, gif, png, jpeg and many more.
        num_frames: number of frames, at least 1; see `frame_indices`.
        image_size: height and width of the squashed frames, in pixels; see `mplug2_fast.ops.preprocess_frames`.
        limits: on time, pixels, frames and memory; None means the defaults of `Limits`.

    Returns:
        (3, num_frames, image_size, image_size), float32, normalised.

    Raises:
        VideoError: the file cannot be decoded, or exceeds a limit; one line, "<path>: <reason>".
        ValueError: `num_frames` or `image_size` is below 1.
        ImportError: PyAV is not installed.
    """
    return load_clip(path, num_frames, image_size, Guard(limits))[0]


def load_clip(
    path: str | os.PathLike[str], num_frames: int = 16, image_size: int = 224, guard: Guard | None = None
) -> tuple[Tensor, list[int]]:
    """Like `load_video`, but also returns the indices of the frames."""
    if num_frames < 1 or image_size < 1:
        raise ValueError(f"num_frames and image_size must be at least 1, not {num_frames} and {image_size}")
    frames, indices = _decode(path, num_frames, image_size, guard)
    return preprocess_frames(torch.from_numpy(np.stack(frames)), image_size), indices


def _decode(
    path: str | os.PathLike[str], num_frames: int, image_size: int | None, guard: Guard | None
) -> tuple[list[np.ndarray], list[int]]:
    from mplug2_fast.video.decode import decode_frames

    indices: list[int] = []

    def choose(total: int) -> list[int]:
        indices[:] = frame_indices(total, num_frames)
        return indices

    return decode_frames(path, choose, image_size=image_size, guard=guard), indices

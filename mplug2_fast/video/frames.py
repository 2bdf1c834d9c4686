"""Reads the model's input frames from a video."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mplug2_fast.video.clips import ClipOptions, clips_of
from mplug2_fast.video.limits import Guard, Limits
from mplug2_fast.video.preparation import MPLUG2, Preparation


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
    (clip,) = clips_of(path, ClipOptions(num_frames, None), Guard(limits))
    return torch.from_numpy(np.stack(clip.frames))


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
    clip = prepare_clip(path, MPLUG2, num_frames, image_size, guard)
    return clip.video, clip.indices


class PreparedClip(NamedTuple):
    """The input of a model: `video` (3, frames, size, size), float32, normalised.

    `indices` are the frames' numbers in the file, `size` is the width and height of the file's frames, upright, and
    `decoder` is what decoded it: "pillow" or "pyav".
    """

    video: Tensor
    indices: list[int]
    size: tuple[int, int]
    decoder: str


def prepare_clip(
    path: str | os.PathLike[str],
    preparation: Preparation,
    num_frames: int,
    image_size: int,
    guard: Guard | None = None,
) -> PreparedClip:
    """Reads a video file, or a still image, as the input of a model with this preparation.

    Raises:
        VideoError, ValueError: as in `load_video`.
    """
    if num_frames < 1 or image_size < 1:
        raise ValueError(f"num_frames and image_size must be at least 1, not {num_frames} and {image_size}")
    (clip,) = clips_of(path, ClipOptions(num_frames, image_size, preparation=preparation), guard)
    video = preparation.tensor(torch.from_numpy(np.stack(clip.frames)), torch.float32, clip.size)
    return PreparedClip(video, clip.indices, clip.size, clip.backend)

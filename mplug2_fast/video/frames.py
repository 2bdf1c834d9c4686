"""Which frames of a video the model sees, and their pixels."""

from __future__ import annotations

import os
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mplug2_fast.errors import VideoError
from mplug2_fast.ops.preprocess_frames import preprocess_frames


def frame_indices(total: int, num_frames: int) -> list[int]:
    """The frames of a video that the released pipeline takes at test time.

    The video is cut into `num_frames` intervals of nearly equal length and the middle frame of each is taken:
    (first + last) // 2. A video with fewer frames gives all of them and repeats the last.

    Args:
        total: number of frames in the video, at least 1.
        num_frames: number of frames to take, at least 1.

    Returns:
        `num_frames` indices from 0 to `total - 1`, in ascending order.

    Raises:
        ValueError: either number is below 1.
    """
    for name, number in (("total", total), ("num_frames", num_frames)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    taken = min(num_frames, total)
    bounds = np.linspace(0, total, taken + 1).astype(int).tolist()
    indices = [(first + end - 1) // 2 for first, end in pairwise(bounds)]
    return indices + indices[-1:] * (num_frames - taken)


def read_frames(path: str | os.PathLike[str], num_frames: int) -> Tensor:
    """Decodes the frames of a video, or a still image, that `frame_indices` names.

    The frames are those of decoding the whole file and counting, whatever its header says of their number. Frames are
    upright (a rotation that the file asks for, as phones do, is applied) and RGB; transparency is dropped.

    Args:
        path: a file that PyAV can decode: mp4, mkv, avi, webm, gif, png, jpeg and many more.
        num_frames: number of frames, at least 1.

    Returns:
        (num_frames, height, width, 3), uint8.

    Raises:
        VideoError: the file cannot be turned into frames; one line, "<path>: <reason>".
        ValueError: `num_frames` is below 1.
        ImportError: PyAV is not installed.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, not {num_frames}")
    from mplug2_fast.video.decode import decode_frames

    frames = decode_frames(path, lambda total: frame_indices(total, num_frames))
    shapes = {frame.shape[:2] for frame in frames}
    if len(shapes) > 1:
        sizes = " and ".join(f"{width}x{height}" for height, width in sorted(shapes))
        raise VideoError(f"{os.fspath(path)}: frames change size within the video ({sizes})")
    return torch.from_numpy(np.stack(frames))


def load_video(path: str | os.PathLike[str], num_frames: int = 16, image_size: int = 224) -> Tensor:
    """A video file, or a still image, as the model's input at test time.

    Args:
        path: a file that PyAV can decode: mp4, mkv, avi, webm, gif, png, jpeg and many more.
        num_frames: number of frames, at least 1; see `frame_indices`.
        image_size: height and width that frames are squashed to, in pixels; see `mplug2_fast.ops.preprocess_frames`.

    Returns:
        (3, num_frames, image_size, image_size), float32, normalised.

    Raises:
        VideoError: the file cannot be turned into frames; one line, "<path>: <reason>".
        ValueError: `num_frames` or `image_size` is below 1.
        ImportError: PyAV is not installed.
    """
    return preprocess_frames(read_frames(path, num_frames), image_size)

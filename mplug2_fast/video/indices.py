"""Chooses the frames of a video for the model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np


def frame_indices(total: int, num_frames: int) -> list[int]:
    """The frames of a video that the official pipeline takes at test time.

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
    indices = [(first + end - 1) // 2 for first, end in _intervals(total, num_frames)]
    return indices + indices[-1:] * (num_frames - len(indices))


def random_frame_indices(total: int, num_frames: int, generator: np.random.Generator) -> list[int]:
    """The frames of a video that the official pipeline takes in training: a random one of each interval.

    Intervals, arguments, result and errors are those of `frame_indices`.
    """
    indices = [int(generator.integers(first, end)) for first, end in _intervals(total, num_frames)]
    return indices + indices[-1:] * (num_frames - len(indices))


def _intervals(total: int, num_frames: int) -> Iterator[tuple[int, int]]:
    for name, number in (("total", total), ("num_frames", num_frames)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    return pairwise(np.linspace(0, total, min(num_frames, total) + 1).astype(int).tolist())

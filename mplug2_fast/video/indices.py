"""Which frames of a video the model sees."""

from __future__ import annotations

from itertools import pairwise

import numpy as np


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

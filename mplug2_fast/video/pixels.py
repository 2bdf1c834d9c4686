"""Squashes a decoded frame."""

from __future__ import annotations

from typing import Literal

import numpy as np


def squash(pixels: np.ndarray, size: int, resampling: Literal["nearest", "bilinear"] = "nearest") -> np.ndarray:
    """From (height, width, 3), RGB, to (size, size, 3).

    "nearest" is what `mplug2_fast.ops.preprocess_frames` does, "bilinear" is libav's filter.
    """
    if resampling == "nearest":
        rows, columns = (np.arange(size) * length // size for length in pixels.shape[:2])
        return pixels.take(rows, axis=0).take(columns, axis=1)
    from av import VideoFrame

    frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    return frame.reformat(size, size, "rgb24", interpolation="BILINEAR").to_ndarray()

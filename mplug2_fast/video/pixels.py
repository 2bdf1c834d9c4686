"""Squashes a decoded frame."""

from __future__ import annotations

import numpy as np


def squash(pixels: np.ndarray, size: int) -> np.ndarray:
    """From (height, width, 3) to (size, size, 3), as `mplug2_fast.ops.preprocess_frames` does."""
    rows, columns = (np.arange(size) * length // size for length in pixels.shape[:2])
    return pixels.take(rows, axis=0).take(columns, axis=1)

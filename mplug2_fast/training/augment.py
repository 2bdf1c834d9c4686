"""Random changes of frames in training. One change applies to all frames of a clip.

The preparation of a model decides which it can have: `AUGMENTATIONS` are for mPLUG-2, `PICTURE_AUGMENTATIONS` for
images with mPLUG.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from mplug2_fast.images import GroundingAugment, ImageAugment

VIDEO_MARGIN = 1.14
"""Frames are this much larger than the crop: mPLUG-2's pre-training."""


class Augmentation(ABC):
    """From the frames of a clip to frames of the model's size."""

    @abstractmethod
    def decoded_size(self, size: int) -> int | None:
        """Height and width that the decoder squashes frames to; None keeps the file's."""

    @abstractmethod
    def __call__(self, frames: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        """Frames `(T, height, width, 3)`, uint8, to `(T, size, size, 3)`."""


class Unchanged(Augmentation):
    """Frames squashed to the model's size, as in evaluation."""

    def decoded_size(self, size: int) -> int | None:
        return size

    def __call__(self, frames: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        return frames


class VideoCrop(Augmentation):
    """A random crop of a slightly larger frame, at the same place in all frames."""

    def decoded_size(self, size: int) -> int | None:
        return round(VIDEO_MARGIN * size)

    def __call__(self, frames: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        top, left = (int(rng.integers(extent - size + 1)) for extent in frames.shape[1:3])
        return frames[:, top : top + size, left : left + size]


class ImageCrop(Augmentation):
    """A random crop of half of the area or more, squashed to the model's size, and a flip half of the time."""

    def decoded_size(self, size: int) -> int | None:
        return 2 * size

    def __call__(self, frames: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        extent = frames.shape[1]
        side = max(1, round(extent * float(np.sqrt(rng.uniform(0.5, 1.0)))))
        top, left = (int(rng.integers(extent - side + 1)) for _ in range(2))
        places = (np.arange(size) * side // size).astype(int)
        frames = frames[:, top + places][:, :, left + places]
        return np.ascontiguousarray(frames[:, :, ::-1]) if rng.random() < 0.5 else frames


AUGMENTATIONS: dict[str, Augmentation] = {"none": Unchanged(), "video": VideoCrop(), "image": ImageCrop()}
"""Name, as recipes state it, to augmentation."""

PICTURE_AUGMENTATIONS: dict[str, ImageAugment | GroundingAugment] = {
    "randaugment": ImageAugment(),
    "randaugment_corrected": ImageAugment(flip=False, clip_sharpness=True),
    "grounding": GroundingAugment(),
    "grounding_corrected": GroundingAugment(correct_crop=True),
}
"""Those of the official mPLUG code. The corrected ones do not flip images whose text may say "left" or "right", clip
what the official Sharpness wraps around, and never crop away the object of a phrase."""

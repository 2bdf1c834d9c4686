"""How files become the input of a model: which frames are taken, and how each becomes a square of pixels.

A family of models has one `Preparation`, or one per task: `config.preparation` and `task.preparation(config)`. Decoders
run it in other processes, so it is small and can be pickled, and importing it does not import torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mplug2_fast.video.indices import frame_indices
from mplug2_fast.video.pixels import squash

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mplug2_fast.video.limits import Guard

Box = tuple[float, float, float, float]
Resampling = Literal["nearest", "bilinear"]


@dataclass(frozen=True)
class Preparation(ABC):
    """How a file becomes the input of a model.

    Attributes:
        name: in the settings of bulk runs and in evaluation reports. Another name means other pixels.
        sampling: how `frames` chooses, for reports.
    """

    name: ClassVar[str]
    sampling: ClassVar[str]

    @property
    def views(self) -> int:
        """Clips that a file gives. If several, `tensor` gives them a first axis."""
        return 1

    @abstractmethod
    def frames(self, total: int, count: int) -> list[int]:
        """The indices of `count` frames of a video of `total` frames, in ascending order."""

    @abstractmethod
    def resampling(self, total: int) -> Resampling | None:
        """How the decoder squashes the frames of a file of `total` frames. None keeps their size, for `square`."""

    def still(self, path: str, count: int, guard: Guard) -> np.ndarray | None:
        """The pixels (height, width, 3) of a still image, read by Pillow; None leaves the file to the video decoder.

        `count` is the number of frames that the model takes.
        """
        return None

    @abstractmethod
    def square(self, pixels: np.ndarray, size: int) -> np.ndarray:
        """A frame of any size, (height, width, 3), uint8, as the model's square (size, size, 3)."""

    def tensor(self, frames: torch.Tensor, dtype: torch.dtype, picture_size: tuple[int, int]) -> torch.Tensor:
        """Normalises squares (frames, size, size, 3), uint8, to (3, frames, size, size).

        `picture_size` is the width and height before `square`.
        """
        from mplug2_fast.ops.preprocess_frames import preprocess_frames

        return preprocess_frames(frames, frames.shape[1], dtype)

    def box_in_pixels(self, box: Box, width: int, height: int) -> Box:
        """The corners (left, top, right, bottom), in pixels of a picture of this size, of a box of the model's square.

        Boxes are (center x, center y, width, height), each in [0, 1]. Corners outside the picture move to its edge.
        """
        x, y, w, h = box
        left, right = (min(max(side * width, 0.0), float(width)) for side in (x - w / 2, x + w / 2))
        top, bottom = (min(max(side * height, 0.0), float(height)) for side in (y - h / 2, y + h / 2))
        return left, top, right, bottom

    def box_in_square(self, box: Box, width: int, height: int) -> Box:
        """A box of a picture of this size, in [0, 1], as a box of the model's square."""
        return box


@dataclass(frozen=True)
class NearestSquash(Preparation):
    """mPLUG-2's: the middle frame of equal intervals, squashed to the nearest pixels. An image is a video."""

    name = "mplug2"
    sampling = "the middle frame of equal intervals"

    def frames(self, total: int, count: int) -> list[int]:
        return frame_indices(total, count)

    def resampling(self, total: int) -> Resampling:
        return "nearest"

    def square(self, pixels: np.ndarray, size: int) -> np.ndarray:
        return squash(pixels, size)


MPLUG2 = NearestSquash()

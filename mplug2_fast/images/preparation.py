"""How files become the input of mPLUG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mplug2_fast.images.load import read_still
from mplug2_fast.images.transforms import Box, Placement, in_square, normalise_in_square, resize
from mplug2_fast.video.preparation import Preparation, Resampling

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mplug2_fast.video.limits import Guard


@dataclass(frozen=True)
class MPlugPreparation(Preparation):
    """Images by Pillow, squashed with its bicubic filter. Frames of videos are squashed with libav's bilinear filter.

    Videos give frame 0 and every n-th frame after it, where n is the length divided by the number of frames, rounded
    down. A video with too few frames gives frame 0 repeatedly. Where several frames are taken, an animation is a video;
    otherwise its first frame is an image.
    """

    name = "mplug"
    sampling = "every n-th frame from the first on"

    def frames(self, total: int, count: int) -> list[int]:
        for name, number in (("total", total), ("num_frames", count)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, not {number}")
        step = total // count
        return [step * number for number in range(count)]

    def resampling(self, total: int) -> Resampling | None:
        return "bilinear" if total > 1 else None

    def still(self, path: str, count: int, guard: Guard) -> np.ndarray | None:
        return read_still(path, guard, animations=count == 1)

    def square(self, pixels: np.ndarray, size: int) -> np.ndarray:
        return resize(pixels, size, size, bicubic=True)


@dataclass(frozen=True)
class MPlugGrounding(MPlugPreparation):
    """For visual grounding: pictures keep their shape, in the middle of a square of zeros. ImageNet's mean and std.

    Args:
        image_size: of the square, on which boxes depend because the margins are whole pixels.
    """

    image_size: int

    name = "mplug_grounding"

    def resampling(self, total: int) -> None:
        return None

    def square(self, pixels: np.ndarray, size: int) -> np.ndarray:
        if size != self.image_size:
            raise ValueError(f"the preparation is for squares of {self.image_size} pixels, not {size}")
        return in_square(pixels, size)

    def tensor(self, frames: torch.Tensor, dtype: torch.dtype, picture_size: tuple[int, int]) -> torch.Tensor:
        return normalise_in_square(frames, Placement.centred(*picture_size, frames.shape[1])).to(dtype)

    def box_in_pixels(self, box: Box, width: int, height: int) -> Box:
        return Placement.centred(width, height, self.image_size).corners_in_picture(box, width, height)

    def box_in_square(self, box: Box, width: int, height: int) -> Box:
        return Placement.centred(width, height, self.image_size).box_in_square(box, width, height)


MPLUG = MPlugPreparation()

"""From pixels to the input of mPLUG at test time, and between boxes of a picture and of the model's square.

Boxes are (center x, center y, width, height), each in [0, 1] of the picture or of the square.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Box = tuple[float, float, float, float]


def resize(pixels: np.ndarray, width: int, height: int, *, bicubic: bool = False) -> np.ndarray:
    """Resizes (height, width, 3), uint8, with Pillow's bilinear or bicubic filter."""
    from PIL import Image

    if pixels.shape[:2] == (height, width):
        return pixels
    filter = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    return np.array(Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), filter))


def normalise(frames: Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> Tensor:
    """(x / 255 - mean) / std of (frames, height, width, 3), uint8, as (3, frames, height, width), float32."""
    import torch

    shape = (3, 1, 1, 1)
    values = frames.permute(3, 0, 1, 2).to(torch.float32).div_(255)
    return values.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape)).contiguous()


class Placement(NamedTuple):
    """Where a picture is in the model's square, in pixels of the square.

    The picture has `width` x `height` pixels there, from column `left` and row `top`. `scale` is the ratio of the long
    sides: a pixel of the original picture takes up `scale` pixels of the square.
    """

    size: int
    scale: float
    width: int
    height: int
    left: int
    top: int

    @classmethod
    def centred(cls, width: int, height: int, size: int) -> Placement:
        """The place of a picture at test time: as large as the square, and in its middle."""
        scaled = scaled_size(width, height, size / max(width, height))
        left, top = (max(round((size - side) / 2 - 0.1), 0) for side in scaled)
        return cls(size, size / max(width, height), *scaled, left, top)

    def box_in_square(self, box: Box, width: int, height: int) -> Box:
        """From a box of the picture of `width` x `height` pixels to a box of the square."""
        x, y, w, h = (
            part * extent * self.scale for part, extent in zip(box, (width, height, width, height), strict=True)
        )
        return (x + self.left) / self.size, (y + self.top) / self.size, w / self.size, h / self.size

    def corners_in_picture(self, box: Box, width: int, height: int) -> Box:
        """From a box of the square to the corners (left, top, right, bottom) in pixels of the picture.

        Corners outside the picture move to its edge.
        """
        x, y, w, h = box
        corners = (x - w / 2, self.left, width), (y - h / 2, self.top, height)
        corners += (x + w / 2, self.left, width), (y + h / 2, self.top, height)
        left, top, right, bottom = (
            min(max((value * self.size - start) / self.scale, 0.0), float(extent)) for value, start, extent in corners
        )
        return left, top, right, bottom


def scaled_size(width: int, height: int, scale: float) -> tuple[int, int]:
    """The width and height of a scaled picture, at least 1."""
    return max(round(width * scale), 1), max(round(height * scale), 1)


def in_square(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resizes a picture and pastes it into a black square (size, size, 3), uint8, as `Placement.centred` states."""
    place = Placement.centred(pixels.shape[1], pixels.shape[0], size)
    square = np.zeros((size, size, 3), np.uint8)
    square[place.top : place.top + place.height, place.left : place.left + place.width] = resize(
        pixels, place.width, place.height
    )
    return square


def normalise_in_square(
    frames: Tensor, place: Placement, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Tensor:
    """Like `normalise`, for pictures in squares: (3, frames, size, size) with zeros outside the pictures."""
    import torch

    rows, columns = slice(place.top, place.top + place.height), slice(place.left, place.left + place.width)
    result = torch.zeros(3, *frames.shape[:3])
    result[:, :, rows, columns] = normalise(frames[:, rows, columns], mean, std)
    return result

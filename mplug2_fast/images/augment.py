"""Random changes of pictures in training: for mPLUG's images, and for its visual grounding.

What is random follows from the generator alone, so a seed repeats it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mplug2_fast.images.randaugment import rand_augment
from mplug2_fast.images.transforms import Box, Placement, resize, scaled_size

_TRIES = 10
_CROP_TRIES = 20
_ASPECTS = (3 / 4, 4 / 3)
_DIRECTIONS = ("left", "right", "top", "bottom", "middle")
_OFFICIAL_SIZE = 336
_SHORT_SIDES = (400, 500, 600)
_CROP_SIDES = (384, 600)
_MAX_ASPECT = 20
"""Longer pictures are not cropped, because scaling their short side up would take too much memory."""
_SCALES = 7
"""Long sides in training: the model's size, and in steps of 1/21 down to 15/21 of it."""


@dataclass(frozen=True)
class ImageAugment:
    """A random crop resized to a square, a flip half of the time, and RandAugment.

    Args:
        scale: range of the crop's share of the area; pre-training had (0.2, 1).
        flip: also for texts that say "left" or "right", which stay as they are. False never flips.
        clip_sharpness: see `mplug2_fast.images.randaugment.sharpness`.
    """

    scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = True
    clip_sharpness: bool = False

    def __call__(self, pixels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        """Pixels (height, width, 3), uint8, to (size, size, 3)."""
        top, left, height, width = self._crop(*pixels.shape[:2], rng)
        pixels = resize(pixels[top : top + height, left : left + width], size, size, bicubic=True)
        if self.flip and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(rand_augment(pixels, rng, clip_sharpness=self.clip_sharpness))

    def _crop(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width of the crop; the middle of the picture if no random crop fits."""
        for _ in range(_TRIES):
            area = height * width * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(*map(math.log, _ASPECTS)))
            wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < wide <= width and 0 < high <= height:
                return int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1)), high, wide
        least, most = _ASPECTS
        high, wide = min(height, max(round(width / least), 1)), min(width, max(round(height * most), 1))
        return (height - high) // 2, (width - wide) // 2, high, wide


class Grounded(NamedTuple):
    """A training sample of visual grounding: pixels, the phrase, and the box of the square.

    `pixels` are (size, size, 3), uint8, black outside of `place`.
    """

    pixels: np.ndarray
    phrase: str
    box: Box
    place: Placement


@dataclass(frozen=True)
class GroundingAugment:
    """Random size, crop, colours, flip and place of a picture with a phrase and its box.

    Pictures whose phrase says left, right, top, bottom or middle are never cropped. A flip exchanges "left" and "right"
    in the phrase. Sizes are the official ones for a square of 336 pixels, and proportional for others.

    Args:
        correct_crop: take crops that contain the centre of the box. By default, crops are chosen as in the official
            code, which compares x with the top and y with the left of the crop, and may leave nothing of the box.
    """

    correct_crop: bool = False

    def __call__(self, pixels: np.ndarray, phrase: str, box: Box, size: int, rng: np.random.Generator) -> Grounded:
        """A picture (height, width, 3), its phrase and the box of the picture to a training sample."""
        phrase = phrase.lower()
        height, width = pixels.shape[:2]
        x, y, w, h = np.asarray(box) * (width, height, width, height)
        corners = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
        if not any(word in phrase for word in _DIRECTIONS) and rng.random() >= 0.5:
            pixels, corners = self._cropped(pixels, corners, size, rng)
        long_side = round(size * (1 - int(rng.integers(_SCALES)) / 21))
        pixels, corners = _scaled(pixels, corners, long_side / max(pixels.shape[:2]))
        pixels = _jittered(pixels, rng)
        if rng.random() < 0.5:
            pixels, phrase, corners = flipped(pixels, phrase, corners)
        return _placed(pixels, phrase, corners, size, rng)

    def _cropped(
        self, pixels: np.ndarray, corners: np.ndarray, size: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        short_side = _proportional(int(rng.choice(_SHORT_SIDES)), size)
        if max(pixels.shape[:2]) > _MAX_ASPECT * min(pixels.shape[:2]):
            return pixels, corners
        pixels, corners = _scaled(pixels, corners, short_side / min(pixels.shape[:2]))
        height, width = pixels.shape[:2]
        least, most = (_proportional(side, size) for side in _CROP_SIDES)
        x, y = (corners[:2] + corners[2:]) / 2
        for _ in range(_CROP_TRIES):
            wide, high = (int(rng.integers(min(least, side), min(side, most) + 1)) for side in (width, height))
            top, left = int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1))
            inside = left < x < left + wide and top < y < top + high
            if inside if self.correct_crop else x > top and y > left:
                corners = (corners - (left, top, left, top)).clip(0, (wide, high, wide, high))
                return pixels[top : top + high, left : left + wide], corners
        return pixels, corners


def flipped(pixels: np.ndarray, phrase: str, corners: np.ndarray) -> tuple[np.ndarray, str, np.ndarray]:
    """Mirrors a picture and its box, and exchanges "left" and "right" in the phrase."""
    parts = phrase.split("right")
    phrase = "left".join(part.replace("left", "right") for part in parts)
    left, top, right, bottom = corners
    width = pixels.shape[1]
    return pixels[:, ::-1], phrase, np.array([width - right, top, width - left, bottom])


def _proportional(side: int, size: int) -> int:
    return max(round(side * size / _OFFICIAL_SIZE), 1)


def _scaled(pixels: np.ndarray, corners: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    return resize(pixels, *scaled_size(pixels.shape[1], pixels.shape[0], scale)), corners * scale


def _jittered(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Changes brightness, contrast and saturation, in random order, four times out of five."""
    from PIL import Image, ImageEnhance

    if rng.random() >= 0.8:
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels))
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for number in rng.permutation(3).tolist():
        image = enhancers[number](image).enhance(float(rng.uniform(0.6, 1.4)))
    return np.asarray(image)


def _placed(pixels: np.ndarray, phrase: str, corners: np.ndarray, size: int, rng: np.random.Generator) -> Grounded:
    height, width = pixels.shape[:2]
    top, left = int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1))
    square = np.zeros((size, size, 3), np.uint8)
    square[top : top + height, left : left + width] = pixels
    first, second = corners[:2], corners[2:]
    box = np.concatenate([(first + second) / 2 + (left, top), second - first]) / size
    place = Placement(size, 1.0, width, height, left, top)
    return Grounded(square, phrase, tuple(box.tolist()), place)

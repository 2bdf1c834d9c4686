"""RandAugment's operations on RGB pictures (height, width, 3), uint8, as mPLUG's training uses them.

The warps are those of recent versions of OpenCV: bilinear in float32, without rounding positions to 32nds of a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

LEVEL = 0.7
"""Strength: level 7 of 10."""
BORDER = 128
"""What a warp shows outside the picture."""


def auto_contrast(pixels: np.ndarray) -> np.ndarray:
    """Stretches the range of each channel to 0..255."""
    return _by_channel(pixels, _contrast_table)


def equalize(pixels: np.ndarray) -> np.ndarray:
    """Makes the values of each channel equally frequent."""
    return _by_channel(pixels, _equal_table)


def brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies all values."""
    return (np.arange(256) * factor).clip(0, 255).astype(np.uint8)[pixels]


def sharpness(pixels: np.ndarray, factor: float, *, clip: bool = False) -> np.ndarray:
    """Extrapolates from the blurred picture, except at the border.

    Args:
        factor: 1 changes nothing, 0 blurs.
        clip: limit values to 0..255. By default they wrap modulo 256, as in the official code.
    """
    wide = pixels.astype(np.int32)
    height, width = pixels.shape[:2]
    if height < 3 or width < 3:
        return pixels.copy()
    inner = wide[1:-1, 1:-1]
    around = sum(wide[y : y + height - 2, x : x + width - 2] for y in range(3) for x in range(3))
    blurred = ((2 * (around + 4 * inner) + 13) // 26).astype(np.float32)  # the mean, rounded
    sharp = blurred + np.float32(factor) * (inner.astype(np.float32) - blurred)
    result = pixels.copy()
    result[1:-1, 1:-1] = (sharp.clip(0, 255) if clip else sharp).astype(np.int32).astype(np.uint8)
    return result


def shear_x(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Moves each row by `factor` times its number."""
    return _warp(pixels, ((1, factor, 0), (0, 1, 0)))


def shear_y(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Moves each column by `factor` times its number."""
    return _warp(pixels, ((1, 0, 0), (factor, 1, 0)))


def translate_x(pixels: np.ndarray, offset: float) -> np.ndarray:
    """Moves the picture to the left."""
    return _warp(pixels, ((1, 0, -offset), (0, 1, 0)))


def translate_y(pixels: np.ndarray, offset: float) -> np.ndarray:
    """Moves the picture up."""
    return _warp(pixels, ((1, 0, 0), (0, 1, -offset)))


def rotate(pixels: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates counterclockwise about (width / 2, height / 2)."""
    x, y = pixels.shape[1] / 2, pixels.shape[0] / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _warp(pixels, ((cos, sin, (1 - cos) * x - sin * y), (-sin, cos, sin * x + (1 - cos) * y)))


Operation = Callable[[np.ndarray, np.random.Generator, bool], np.ndarray]
"""From the picture, the source of random signs, and whether Sharpness clips, to the changed picture."""

OPERATIONS: dict[str, Operation] = {
    "Identity": lambda pixels, rng, clip: pixels,
    "AutoContrast": lambda pixels, rng, clip: auto_contrast(pixels),
    "Equalize": lambda pixels, rng, clip: equalize(pixels),
    "Brightness": lambda pixels, rng, clip: brightness(pixels, 1.8 * LEVEL + 0.1),
    "Sharpness": lambda pixels, rng, clip: sharpness(pixels, 1.8 * LEVEL + 0.1, clip=clip),
    "ShearX": lambda pixels, rng, clip: shear_x(pixels, _signed(0.3 * LEVEL, rng)),
    "ShearY": lambda pixels, rng, clip: shear_y(pixels, _signed(0.3 * LEVEL, rng)),
    "TranslateX": lambda pixels, rng, clip: translate_x(pixels, _signed(10 * LEVEL, rng)),
    "TranslateY": lambda pixels, rng, clip: translate_y(pixels, _signed(10 * LEVEL, rng)),
    "Rotate": lambda pixels, rng, clip: rotate(pixels, _signed(30 * LEVEL, rng)),
}
"""Each operation at its strength in training, with a random sign where it has one."""


def rand_augment(
    pixels: np.ndarray, rng: np.random.Generator, *, count: int = 2, clip_sharpness: bool = False
) -> np.ndarray:
    """`count` operations, drawn with replacement; each is skipped half of the time."""
    names = list(OPERATIONS)
    for number in rng.integers(len(names), size=count).tolist():
        if rng.random() < 0.5:
            pixels = OPERATIONS[names[number]](pixels, rng, clip_sharpness)
    return pixels


def _signed(value: float, rng: np.random.Generator) -> float:
    return value if rng.random() < 0.5 else -value


def _by_channel(pixels: np.ndarray, table_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.stack([table_of(channel)[channel] for channel in np.moveaxis(pixels, -1, 0)], axis=-1)


def _contrast_table(channel: np.ndarray) -> np.ndarray:
    low, high = int(channel.min()), int(channel.max())
    if high <= low:
        return np.arange(256, dtype=np.uint8)
    scale = 255 / (high - low)
    return (np.arange(256) * scale - low * scale).clip(0, 255).astype(np.uint8)


def _equal_table(channel: np.ndarray) -> np.ndarray:
    counts = np.bincount(channel.ravel(), minlength=256)
    step = (channel.size - counts[counts > 0][-1]) // 255
    if step == 0:
        return np.arange(256, dtype=np.uint8)
    before = np.concatenate(([0], np.cumsum(counts[:-1])))
    return ((before + step // 2) // step).clip(0, 255).astype(np.uint8)


def _warp(pixels: np.ndarray, matrix: tuple[tuple[float, ...], ...]) -> np.ndarray:
    """Applies a matrix (2, 3) that maps positions in the picture to positions in the result."""
    height, width = pixels.shape[:2]
    forward = np.asarray(matrix, dtype=np.float64)
    inverse = np.linalg.inv(forward[:, :2])
    (a, b), (c, d) = inverse.astype(np.float32)
    left, top = (-inverse @ forward[:, 2]).astype(np.float32)
    columns, rows = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    x, y = a * columns + b * rows + left, c * columns + d * rows + top
    column, row = np.floor(x), np.floor(y)
    right, down = (x - column)[..., None], (y - row)[..., None]
    framed = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), constant_values=BORDER).reshape(-1, 3).astype(np.float32)
    here, beside = ((column + 1 + more).clip(0, width + 1).astype(np.intp) for more in (0, 1))
    above, below = ((row + 1 + more).clip(0, height + 1).astype(np.intp) * (width + 2) for more in (0, 1))

    def blend(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        value = framed.take(first, axis=0)
        return value + right * (framed.take(second, axis=0) - value)

    upper, lower = blend(above + here, above + beside), blend(below + here, below + beside)
    return np.rint(upper + down * (lower - upper)).astype(np.uint8)

"""Pixels of a scene, with soft edges."""

from __future__ import annotations

import numpy as np

from examples.shapes.scenes import COLORS, SIDE, Scene


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The picture `(SIDE, SIDE, 3)`, uint8. Background, exact colours and noise come from `rng`."""
    ramp = np.linspace(-0.5, 0.5, SIDE, dtype=np.float32)
    slope = rng.uniform(-0.06, 0.06, 2)
    shade = rng.uniform(0.06, 0.2) + slope[0] * ramp[None, :] + slope[1] * ramp[:, None]
    picture = np.repeat(shade[:, :, None], 3, axis=2).astype(np.float32)
    for each in scene:
        rows, columns = slice(each.top, each.top + each.side), slice(each.left, each.left + each.side)
        color = np.array(COLORS[each.color]) + rng.uniform(-0.05, 0.05, 3)
        share = _cover(each.shape, each.side)[:, :, None]
        picture[rows, columns] += share * (color - picture[rows, columns])
    picture += rng.normal(0, 0.015, picture.shape)
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _cover(shape: str, side: int) -> np.ndarray:
    """`(side, side)`: the share of each pixel of an object's square that the object covers."""
    at = (np.arange(side) + 0.5 - side / 2).astype(np.float32)
    x, y = at[None, :], at[:, None]
    half = side / 2
    inside = {
        "ring": lambda: half / 4 - abs(np.sqrt(x * x + y * y) - 0.75 * half),
        "square": lambda: half - np.maximum(abs(x), abs(y)),
        "triangle": lambda: 0.9 * ((y + half) / 2 - abs(x)),
        "cross": lambda: half / 3 - np.minimum(abs(x), abs(y)),
    }[shape]()
    return np.clip(inside + 0.5, 0, 1)

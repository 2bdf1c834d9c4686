"""Random pictures of two to four shapes. Training and held-out pictures never have the same caption."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

SIDE = 48
"""Height and width of a picture, in pixels."""
GRID = 4
"""Rows and columns of cells. An object stands near the middle of a cell."""
CELL = SIDE // GRID
SIZES = {"small": (8,), "large": (11, 12)}
"""Name -> sides of an object, in pixels."""
COLORS = {
    "red": (0.90, 0.12, 0.12),
    "yellow": (0.95, 0.90, 0.15),
    "green": (0.12, 0.75, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "purple": (0.70, 0.20, 0.85),
}
SHAPES = ("ring", "square", "triangle", "cross")
COUNTS = (2, 3, 4)
RELATIONS = ("left of", "right of", "above", "below")

_HELD_OUT_SHARE = 8
"""One caption in eight is held out."""


class Object(NamedTuple):
    """One shape of a picture: what it is, and its square in pixels."""

    size: str
    color: str
    shape: str
    left: int
    top: int
    side: int

    @property
    def x(self) -> float:
        return self.left + self.side / 2

    @property
    def y(self) -> float:
        return self.top + self.side / 2

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(center x, center y, width, height) as shares of the picture's side."""
        return self.x / SIDE, self.y / SIDE, self.side / SIDE, self.side / SIDE

    def stands(self, relation: str, other: Object) -> bool:
        """Whether this object is, for example, "left of" the other one."""
        if relation in ("left of", "right of"):
            return (self.x < other.x) == (relation == "left of")
        return (self.y < other.y) == (relation == "above")


Scene = tuple[Object, ...]
"""The objects of a picture, from left to right."""


def caption(scene: Scene) -> str:
    """All objects from left to right, and whether each is above or below the next one."""
    words = []
    for this, after in zip(scene, (*scene[1:], None), strict=True):
        words.append(f"a {this.size} {this.color} {this.shape}")
        if after is not None:
            words.append("above" if this.stands("above", after) else "below")
    return " ".join(words)


def is_held_out(scene: Scene) -> bool:
    """Whether the scene belongs to the held-out pictures. Its caption decides."""
    return zlib.crc32(caption(scene).encode()) % _HELD_OUT_SHARE == 0


def sample_scene(rng: np.random.Generator, *, held_out: bool) -> Scene:
    """A random scene of one of the two splits."""
    while True:
        scene = _sample(rng)
        if is_held_out(scene) == held_out:
            return scene


def _sample(rng: np.random.Generator) -> Scene:
    """No two objects look the same, and no two stand in the same row or column of the grid."""
    count = int(rng.choice(COUNTS))
    names = [(size, color, shape) for size in SIZES for color in COLORS for shape in SHAPES]
    looks = [names[kind] for kind in rng.choice(len(names), count, replace=False).tolist()]
    cells = zip(sorted(rng.permutation(GRID)[:count].tolist()), rng.permutation(GRID)[:count].tolist(), strict=True)
    scene = []
    for look, cell in zip(looks, cells, strict=True):
        side = int(rng.choice(SIZES[look[0]]))
        room = CELL - side
        left, top = (CELL * place + int(rng.integers(room // 4, room - room // 4 + 1)) for place in cell)
        scene.append(Object(*look, left, top, side))
    return tuple(scene)

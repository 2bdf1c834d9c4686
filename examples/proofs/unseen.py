"""Frames of moving shapes, and captions such as "a red circle". One in five pairs of color and shape is not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from examples.moving_shapes.data import SAMPLES
from examples.moving_shapes.generator import (
    ACTIONS,
    COLORS,
    SHAPES,
    Scenes,
    caption,
    held_out_scenes,
    sample_scenes,
    training_frames,
    training_rng,
)
from examples.proofs.siblings import Look, Siblings
from mplug2_fast.datasets import Item
from mplug2_fast.training import Sample

MIDDLE_FRAME = 7
FIRST_HELD_OUT = 50_000
HELD_OUT = 2_000
FOLDER = Path(__file__).parent
NAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
CAPTIONS = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in NAMES]
PERIOD = 5


def unseen(color: int, shape: int) -> bool:
    """Whether training has no such pair. It has each color and each shape."""
    return (color + 2 * shape) % PERIOD == 0


COLOR, SHAPE, CAPTION = Look(list(COLORS), "color", 1), Look(SHAPES, "shape", 2), Siblings(CAPTIONS)

UNSEEN = [c * len(SHAPES) + s for c in range(len(COLORS)) for s in range(len(SHAPES)) if unseen(c, s)]
"""Their numbers among `NAMES`."""


class Frames:
    """Training frames of all pairs with their captions."""

    def __init__(self, config: Any) -> None:
        self._size = config.vision.image_size

    def __len__(self) -> int:
        return SAMPLES

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        rng = training_rng(int(rng.integers(2**32)), int(rng.integers(2**32)))
        scenes = sample_scenes(rng, 1)
        while not self.has(scenes):
            scenes = sample_scenes(rng, 1)
        return self.of(scenes, rng)

    def has(self, scenes: Scenes) -> bool:
        """Whether the scene is part of the data."""
        return True

    def of(self, scenes: Scenes, rng: np.random.Generator) -> Sample:
        frames = training_frames(scenes, rng, self._size, (MIDDLE_FRAME,))[0]
        return Sample(Item(id=(text := self.text(scenes)), caption=(text,), label=text), frames)

    def text(self, scenes: Scenes) -> str:
        return caption(scenes, 0).removesuffix(f" {ACTIONS[scenes.action[0]]}")


class Seen(Frames):
    """Training frames of the pairs that are trained."""

    def has(self, scenes: Scenes) -> bool:
        return not unseen(int(scenes.color[0]), int(scenes.shape[0]))


class Gray(Seen):
    """Such frames in gray, whose brightness does not tell the color, for shapes."""

    def of(self, scenes: Scenes, rng: np.random.Generator) -> Sample:
        frames = super().of(scenes, rng).frames
        gray = (frames @ rng.dirichlet((1, 1, 1))).round().astype(np.uint8)
        return Sample(Item(id="", label=f"a gray {SHAPES[scenes.shape[0]]}"), np.repeat(gray[..., None], 3, axis=3))


def held_out(config: Any) -> list[Sample]:
    """Frames of all pairs."""
    data, scenes = Frames(config), held_out_scenes(HELD_OUT, FIRST_HELD_OUT)
    return [data.of(scenes[i], np.random.default_rng([2, i])) for i in range(HELD_OUT)]

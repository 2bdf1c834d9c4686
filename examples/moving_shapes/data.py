"""Moving shapes as training data: new clips without end, each with a caption and a question of a random kind."""

from __future__ import annotations

from typing import Any

import numpy as np

from examples.moving_shapes.generator import (
    QUESTION_KINDS,
    Scenes,
    answer,
    caption,
    questions,
    sample_scenes,
    training_frames,
    training_rng,
)
from mplug2_fast.datasets import Item
from mplug2_fast.training import Sample

CLIPS = 10_000_000
"""Clips of an epoch: more than any run takes."""


class MovingShapes:
    """Clips for training. Their seeds differ from those of held-out scenes.

    Args:
        config: the model's. It determines the size of the frames.
    """

    def __init__(self, config: Any) -> None:
        self._size = config.vision.image_size

    def __len__(self) -> int:
        return CLIPS

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Frames `(4, image_size, image_size, 3)` of one clip, its caption, a question and the answer."""
        rng = training_rng(int(rng.integers(2**32)), int(rng.integers(2**32)))
        return self.of(sample_scenes(rng, 1), rng, str(index))

    def of(self, scenes: Scenes, rng: np.random.Generator, id: str = "") -> Sample:
        """The sample of one scene."""
        kind = QUESTION_KINDS[rng.integers(len(QUESTION_KINDS))]
        item = Item(
            id=id,
            caption=(caption(scenes, 0),),
            question=str(rng.choice(questions(scenes, 0, kind))),
            answers={answer(scenes, 0, kind): 1.0},
        )
        return Sample(item, training_frames(scenes, rng, self._size)[0])

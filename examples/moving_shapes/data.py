"""Moving shapes as training data: new clips without end, each with texts for all tasks, and logs of what happened."""

from __future__ import annotations

from typing import Any

import numpy as np

from examples.moving_shapes.generator import (
    ACTIONS,
    PLACES,
    QUESTION_KINDS,
    SEEN_FRAMES,
    Scenes,
    all_captions,
    answer,
    boxes,
    caption,
    log,
    phrases,
    questions,
    sample_scenes,
    training_frames,
    training_rng,
)
from mplug2_fast.datasets import Item
from mplug2_fast.tasks import Classification
from mplug2_fast.training import Sample

SAMPLES = 10_000_000
"""Samples of an epoch: more than any run takes."""

RECOGNITION = Classification(ACTIONS, name="action")


class MovingShapes:
    """Clips for training. Their seeds differ from those of held-out scenes.

    Args:
        config: the model's. It determines the size of the frames.
    """

    def __init__(self, config: Any) -> None:
        self._size = config.vision.image_size

    def __len__(self) -> int:
        return SAMPLES

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Frames `(4, image_size, image_size, 3)` of one clip, and its texts, box and label."""
        rng = training_rng(int(rng.integers(2**32)), int(rng.integers(2**32)))
        return self.of(sample_scenes(rng, 1), rng)

    def of(self, scenes: Scenes, rng: np.random.Generator) -> Sample:
        """The sample of one scene.

        Its id is the caption: for retrieval, clips with the same caption are the same. The box is that of
        the last frame.
        """
        kind = QUESTION_KINDS[rng.integers(len(QUESTION_KINDS))]
        question = str(rng.choice(questions(scenes, 0, kind)))
        frames = training_frames(scenes, rng, self._size)[0]
        item = Item(
            id=caption(scenes, 0),
            caption=(caption(scenes, 0),),
            question=question,
            answers={answer(scenes, 0, kind): 1.0},
            text=str(rng.choice(phrases(scenes, 0))),
            box=tuple(boxes(scenes, SEEN_FRAMES[-1])[0].tolist()),
            label=ACTIONS[scenes.action[0]],
        )
        return Sample(item, frames)


class Logs:
    """Texts that tell three events and ask for one of them. No clip comes with them."""

    def __init__(self, config: Any) -> None:
        self._captions = all_captions()

    def __len__(self) -> int:
        return SAMPLES

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        events = [self._captions[number] for number in rng.integers(len(self._captions), size=len(PLACES))]
        place = int(rng.integers(len(PLACES)))
        return Sample(Item(id=str(index), text=log(events, PLACES[place]), answers={events[place]: 1.0}), None)

"""Pictures of shapes as training data: each with a caption, a question, and a phrase for one of its objects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from examples.shapes.language import ANSWERS, QUESTION_KINDS, absent, phrase, question
from examples.shapes.render import draw
from examples.shapes.scenes import Scene, caption, sample_scene
from mplug2_fast.datasets import Item
from mplug2_fast.training import Sample

PICTURES = 10_000_000
"""Pictures of an epoch: more than any run takes."""


def example(
    rng: np.random.Generator, *, held_out: bool, id: str = "", image: str | None = None, kind: str | None = None
) -> tuple[Scene, Item]:
    """A random scene, and its item. Kind and answer of the question are drawn first, so all are equally frequent."""
    kind = kind or QUESTION_KINDS[rng.integers(len(QUESTION_KINDS))]
    answer = ANSWERS[kind][rng.integers(len(ANSWERS[kind]))]
    asked = None
    while asked is None:
        scene = sample_scene(rng, held_out=held_out)
        asked = question(scene, kind, answer, rng)
    target = scene[rng.integers(len(scene))]
    item = Item(
        id=id,
        image=image,
        caption=(caption(scene),),
        question=asked,
        answers={answer: 1.0},
        text=phrase(scene, target, rng),
        box=target.box,
        extra={"kind": kind},
    )
    return scene, item


class Shapes:
    """Pictures for training. No caption of a held-out picture is among them.

    Args:
        config: the model's. Its image_size must be that of the pictures.
    """

    def __init__(self, config: Any) -> None:
        self._size = config.vision.image_size

    def __len__(self) -> int:
        return PICTURES

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """One picture `(1, image_size, image_size, 3)` and its texts.

        Its id is the caption: for retrieval, pictures with the same caption are the same.
        """
        return _sample(*example(rng, held_out=False), rng)


class Comparisons(Shapes):
    """Mostly questions about counts, existence and relations, which are learned last.

    When the answer to "is there ..." is "no", two questions in five name a color or a shape that no object has. These
    are easier.
    """

    shares: ClassVar = {"count": 0.32, "exists": 0.32, "relation": 0.26, "color": 0.04, "shape": 0.04, "objects": 0.02}
    """Kind of question -> its share."""

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        kind = str(rng.choice([*self.shares], p=[*self.shares.values()]))
        scene, item = self._example(kind, rng)
        if kind == "exists" and "no" in item.answers and rng.random() < 0.4:
            item = replace(item, question=absent(scene, rng))
        return _sample(scene, item, rng)

    def _example(self, kind: str, rng: np.random.Generator) -> tuple[Scene, Item]:
        return example(rng, held_out=False, kind=kind)


class Relations(Comparisons):
    """Mostly questions about relations, and of these mostly "above" and "below", which are learned last of all.

    Two in five are about pictures of two objects. These are easier.
    """

    shares: ClassVar = {"relation": 0.7, "count": 0.08, "exists": 0.08, "color": 0.07, "shape": 0.05, "objects": 0.02}

    def _example(self, kind: str, rng: np.random.Generator) -> tuple[Scene, Item]:
        easy, upright = kind == "relation" and rng.random() < 0.4, kind == "relation" and rng.random() < 0.75
        while True:
            scene, item = super()._example(kind, rng)
            if not ((easy and len(scene) > 2) or (upright and " of " in str(item.question))):
                return scene, item


def _sample(scene: Scene, item: Item, rng: np.random.Generator) -> Sample:
    return Sample(replace(item, id=item.caption[0]), draw(scene, rng)[None])

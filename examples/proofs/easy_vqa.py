"""Questions about pictures of one shape: 4,000 pictures with 38,575 questions, of the package easy-vqa."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from typing import Any

import numpy as np
from PIL import Image

from examples.proofs.digits import NEEDS
from mplug2_fast.datasets import Item
from mplug2_fast.training import Sample

SHRINK = 2
"""From the 64 pixels of a picture to those of the tiny model."""


@functools.cache
def questions(split: str) -> list[Sample]:
    """All questions of "train" or "test", with their pictures and answers."""
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError(NEEDS) from error
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    pictures = {}
    for number, path in paths.items():
        with Image.open(path) as picture:
            pictures[number] = np.array(picture.convert("RGB").reduce(SHRINK))[None]
    asked = zip(*getattr(easy_vqa, f"get_{split}_questions")(), strict=True)
    return [Sample(Item(id="", question=q, answers={a: 1.0}), pictures[number]) for q, a, number in asked]


class Questions:
    """The training questions."""

    def __init__(self, config: Any) -> None:
        self._samples = questions("train")

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        return self._samples[index]


def held_out(config: Any) -> list[Sample]:
    return questions("test")


def blind() -> dict[str, float]:
    """The accuracy of answering each question as it is most often answered in training, whatever the picture."""
    answers: dict[str | None, Counter[str]] = defaultdict(Counter)
    for item, _ in questions("train"):
        answers[item.question].update(item.answers)
    usual = {question: found.most_common(1)[0][0] for question, found in answers.items()}
    test = questions("test")
    return {"question_only": sum(usual.get(item.question) in item.answers for item, _ in test) / len(test)}

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

COLORS = ("black", "gray", "red", "green", "blue", "yellow", "teal", "brown")
SHAPES = ("circle", "rectangle", "triangle")


@functools.cache
def pictures(split: str) -> dict[int, np.ndarray]:
    """The pictures of "train" or "test" `(1, 64, 64, 3)`, uint8, by their numbers."""
    found = {}
    for number, path in getattr(_package(), f"get_{split}_image_paths")().items():
        with Image.open(path) as picture:
            found[number] = np.array(picture.convert("RGB"))[None]
    return found


def questions(split: str) -> list[Sample]:
    """All questions of "train" or "test", with their pictures and answers."""
    seen = pictures(split)
    return [Sample(Item(id="", question=q, answers={a: 1.0}), seen[number]) for q, a, number in asked(split)]


def looks_of(names: tuple[str, ...], split: str = "train") -> dict[int, str]:
    """Number of a picture -> the name that its questions and answers imply, for example its color."""
    found: dict[int, str] = {}
    absent: dict[int, set[str]] = defaultdict(set)
    for question, answer, number in asked(split):
        words = question.rstrip("?").split()
        named = next((name for name in names if name in words), None)
        if answer in names:
            found[number] = answer
        elif named is not None and (answer not in ("yes", "no") or (answer == "yes") != bool({"no", "not"} & {*words})):
            found[number] = named
        elif named is not None:
            absent[number].add(named)
    left = {number: [name for name in names if name not in some] for number, some in absent.items()}
    return {number: some[0] for number, some in left.items() if len(some) == 1} | found


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


def asked(split: str) -> list[tuple[str, str, int]]:
    """Question, answer and number of the picture."""
    return list(zip(*getattr(_package(), f"get_{split}_questions")(), strict=True))


def _package() -> Any:
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError(NEEDS) from error
    return easy_vqa

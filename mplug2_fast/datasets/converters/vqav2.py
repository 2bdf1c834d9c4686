"""VQAv2: ten answers to each question, each answer weighted by its share of the ten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from mplug2_fast.datasets.converters.base import AnnotationFile, Annotations, Converter
from mplug2_fast.datasets.converters.reading import json_object
from mplug2_fast.datasets.items import Item

IMAGES = {"train": "train2014", "val": "val2014", "test-dev": "test2015", "test": "test2015"}
"""Split -> the part of COCO with its images."""


def shares(answers: Iterable[str]) -> dict[str, float]:
    """Answer -> its share."""
    counts = Counter(answers)
    return {answer: count / counts.total() for answer, count in counts.items()}


def _items(annotations: Annotations) -> Iterator[tuple[str, Item]]:
    for split, images in IMAGES.items():
        questions, labels = f"{split}-questions", f"{split}-annotations"
        if questions not in annotations:
            if labels in annotations:
                annotations.path(questions)
            continue
        answers: dict[str, dict[str, float]] = {}
        if not split.startswith("test"):
            for record in json_object(annotations.path(labels)).records("annotations"):
                ten = [answer.text("answer") for answer in record.records("answers")]
                answers[record.name("question_id")] = shares(ten)
        for record in json_object(annotations.path(questions)).records("questions"):
            name = record.name("question_id")
            if answers and name not in answers:
                raise record.error(f"unknown question_id {name}: {annotations.path(labels)} has no answers to it")
            number = int(record.number("image_id"))
            yield (
                split,
                Item(
                    id=name,
                    image=annotations.media.path(f"{images}/COCO_{images}_{number:012d}.jpg"),
                    question=record.text("question"),
                    answers=answers.get(name, {}),
                ),
            )


CONVERTERS = (
    Converter(
        "vqav2",
        "VQAv2",
        (
            AnnotationFile("train-questions", ("v2_OpenEnded_mscoco_train2014_questions.json",)),
            AnnotationFile("train-annotations", ("v2_mscoco_train2014_annotations.json",)),
            AnnotationFile("val-questions", ("v2_OpenEnded_mscoco_val2014_questions.json",)),
            AnnotationFile("val-annotations", ("v2_mscoco_val2014_annotations.json",)),
            AnnotationFile("test-dev-questions", ("v2_OpenEnded_mscoco_test-dev2015_questions.json",)),
            AnnotationFile("test-questions", ("v2_OpenEnded_mscoco_test2015_questions.json",)),
        ),
        ("image", "question", "answers"),
        tuple(IMAGES),
        _items,
        "files of visualqa.org",
    ),
)

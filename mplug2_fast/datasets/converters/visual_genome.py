"""Visual Genome's questions, for training with VQAv2. Each has one answer of weight 0.5."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from mplug2_fast.datasets.converters.base import AnnotationFile, Annotations, Converter
from mplug2_fast.datasets.converters.reading import json_records
from mplug2_fast.datasets.items import Item

WEIGHT = 0.5


def _items(annotations: Annotations) -> Iterator[tuple[str, Item]]:
    folders: dict[str, str] = {}
    if "images" in annotations:
        for record in json_records(annotations.path("images")):
            folders[record.name("image_id", "id")] = PurePosixPath(record.text("url")).parent.name
    for image in json_records(annotations.path("train")):
        for record in image.records("qas") if image.values.get("qas") else ():
            number = record.name("image_id")
            if folders and number not in folders:
                raise record.error(f"unknown image_id {number}: {annotations.path('images')} does not have it")
            name = f"{folders[number]}/{number}.jpg" if folders else f"{number}.jpg"
            answer = record.text("answer").lower().removesuffix(".")
            yield (
                "train",
                Item(
                    id=record.name("qa_id"),
                    image=annotations.media.path(name),
                    question=record.text("question"),
                    answers={answer: WEIGHT},
                ),
            )


CONVERTERS = (
    Converter(
        "visual-genome",
        "Visual Genome QA",
        (
            AnnotationFile("train", ("question_answers.json",), required=True),
            AnnotationFile("images", ("image_data.json",)),
        ),
        ("image", "question", "answers"),
        ("train",),
        _items,
        "files of visualgenome.org; inferred: answers in lower case without the full stop, as VQAv2's are",
    ),
)

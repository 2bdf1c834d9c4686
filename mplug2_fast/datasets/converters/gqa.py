"""GQA."""

from __future__ import annotations

from collections.abc import Iterator

from mplug2_fast.datasets.converters.base import AnnotationFile, Annotations, Converter
from mplug2_fast.datasets.converters.reading import Record, json_object
from mplug2_fast.datasets.items import Item


def _items(annotations: Annotations) -> Iterator[tuple[str, Item]]:
    for split, path in annotations.each():
        for name, values in json_object(path).values.items():
            record = Record(values, str(path), name)
            answers = {record.text("answer"): 1.0} if split != "test" or "answer" in record else {}
            image = annotations.media.path(f"{record.name('imageId')}.jpg")
            yield split, Item(id=name, image=image, question=record.text("question"), answers=answers)


CONVERTERS = (
    Converter(
        "gqa",
        "GQA",
        (
            AnnotationFile("train", ("train_balanced_questions.json", "train_all_questions_*.json")),
            AnnotationFile("val", ("val_balanced_questions.json", "val_all_questions.json")),
            AnnotationFile("testdev", ("testdev_balanced_questions.json", "testdev_all_questions.json")),
            AnnotationFile("test", ("test_balanced_questions.json", "test_all_questions.json")),
        ),
        ("image", "question", "answers"),
        ("train", "val", "testdev", "test"),
        _items,
        "files of cs.stanford.edu/people/dorarad/gqa",
    ),
)

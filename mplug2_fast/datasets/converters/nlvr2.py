"""NLVR2: whether a sentence is true of two images."""

from __future__ import annotations

from mplug2_fast.datasets.converters.base import AnnotationFile, Annotations, Converter, per_file
from mplug2_fast.datasets.converters.reading import Record, json_lines
from mplug2_fast.datasets.items import Item

LABELS = {"True": True, "False": False, "true": True, "false": False}


def _item(record: Record, annotations: Annotations, name: str) -> Item:
    identifier = record.text("identifier")
    pair, part = identifier.rpartition("-")[0], identifier.partition("-")[0]
    folder = f"images/train/{record.name('directory')}" if "directory" in record else part
    return Item(
        id=identifier,
        images=tuple(annotations.media.path(f"{folder}/{pair}-img{side}.png") for side in (0, 1)),
        text=record.text("sentence"),
        label=record.choice("label", LABELS),
    )


CONVERTERS = (
    Converter(
        "nlvr2",
        "NLVR2",
        (
            AnnotationFile("train", ("train.json",)),
            AnnotationFile("val", ("dev.json",)),
            AnnotationFile("test", ("test1.json",)),
            AnnotationFile("test2", ("test2.json",)),
        ),
        ("images", "text", "label"),
        ("train", "val", "test", "test2"),
        per_file(json_lines, _item),
        "files of lil-lab/nlvr; inferred: images under images/train/DIRECTORY, dev, test1 and test2",
    ),
)

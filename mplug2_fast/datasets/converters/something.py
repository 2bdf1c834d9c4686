"""Something-Something v2: actions as classes, and their descriptions as captions."""

from __future__ import annotations

from mplug2_fast.datasets.converters.base import AnnotationFile, Annotations, Converter, per_file
from mplug2_fast.datasets.converters.reading import Record, json_records
from mplug2_fast.datasets.items import Item


def _item(record: Record, annotations: Annotations, name: str) -> Item:
    clip = record.name("id")
    video = annotations.media.path(f"{clip}.webm")
    if name.startswith("test") and "template" not in record:
        return Item(id=clip, video=video)
    template = record.text("template").replace("[", "").replace("]", "")
    return Item(id=clip, video=video, caption=(record.text("label"),), label=template)


CONVERTERS = (
    Converter(
        "something-something-v2",
        "Something-Something v2",
        (
            AnnotationFile("train", ("something-something-v2-train.json", "train.json")),
            AnnotationFile("val", ("something-something-v2-validation.json", "validation.json")),
            AnnotationFile("test", ("something-something-v2-test.json", "test.json")),
        ),
        ("video", "caption", "label"),
        ("train", "val", "test"),
        per_file(json_records, _item),
        "files of 20BN and Qualcomm; the class is the template without its brackets",
    ),
)

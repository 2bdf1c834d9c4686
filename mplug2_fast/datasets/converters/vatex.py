"""VATEX, the English captions."""

from __future__ import annotations

from mplug2_fast.datasets.converters.base import AnnotationFile, Annotations, Converter, per_file
from mplug2_fast.datasets.converters.reading import Record, json_records
from mplug2_fast.datasets.items import Item


def _item(record: Record, annotations: Annotations, name: str) -> Item:
    clip = record.text("videoID")
    caption = () if name.startswith("private-test") and "enCap" not in record else record.texts("enCap")
    return Item(id=clip, video=annotations.media.path(f"{clip}.mp4"), caption=caption)


CONVERTERS = (
    Converter(
        "vatex",
        "VATEX captions, English",
        (
            AnnotationFile("train", ("vatex_training_v1.0.json",)),
            AnnotationFile("val", ("vatex_validation_v1.0.json",)),
            AnnotationFile("test", ("vatex_public_test_english_v1.1.json",)),
            AnnotationFile("private-test", ("vatex_private_test_without_annotations.json",)),
        ),
        ("video", "caption"),
        ("train", "val", "test", "private-test"),
        per_file(json_records, _item),
        "files of eric-xw.github.io/vatex-website",
    ),
)

"""SNLI-VE: whether an image entails a sentence."""

from __future__ import annotations

from mplug2_fast.datasets.converters.base import AnnotationFile, Annotations, Converter, per_file
from mplug2_fast.datasets.converters.reading import Record, json_lines
from mplug2_fast.datasets.items import Item

LABELS = {name: name for name in ("entailment", "neutral", "contradiction")}


def _item(record: Record, annotations: Annotations, name: str) -> Item | None:
    if record.text("gold_label") == "-":
        annotations.skip("pairs without a gold label")
        return None
    image = record.name("Flickr30K_ID", "Flikr30kID").removesuffix(".jpg")
    return Item(
        id=record.name("pairID") if "pairID" in record else name,
        image=annotations.media.path(f"{image}.jpg"),
        text=record.text("sentence2"),
        label=record.choice("gold_label", LABELS),
    )


CONVERTERS = (
    Converter(
        "snli-ve",
        "SNLI-VE",
        (
            AnnotationFile("train", ("snli_ve_train.jsonl",)),
            AnnotationFile("val", ("snli_ve_dev.jsonl",)),
            AnnotationFile("test", ("snli_ve_test.jsonl",)),
        ),
        ("image", "text", "label"),
        ("train", "val", "test"),
        per_file(json_lines, _item),
        "files of necla-ml/SNLI-VE",
    ),
)

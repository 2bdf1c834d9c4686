"""COCO and Flickr30k captions and retrieval, in Karpathy's splits."""

from __future__ import annotations

from collections.abc import Iterator

from mplug2_fast.datasets.converters.base import AnnotationFile, Annotations, Converter
from mplug2_fast.datasets.converters.reading import json_object
from mplug2_fast.datasets.items import Item

SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
"""`restval` is the part of COCO's validation images that everyone trains on."""


def _items(annotations: Annotations) -> Iterator[tuple[str, Item]]:
    for record in json_object(annotations.path("captions")).records("images"):
        name = record.text("filename")
        image = f"{record.text('filepath')}/{name}" if "filepath" in record else name
        caption = tuple(sentence.text("raw") for sentence in record.records("sentences"))
        item = Item(id=record.name("cocoid", "imgid"), image=annotations.media.path(image), caption=caption)
        yield record.choice("split", SPLITS), item


def _converter(name: str, title: str, file: str) -> Converter:
    return Converter(
        name,
        title,
        (AnnotationFile("captions", (file,), required=True),),
        ("image", "caption"),
        ("train", "val", "test"),
        _items,
        "files of Karpathy and Fei-Fei (2015), caption_datasets.zip",
    )


CONVERTERS = (
    _converter("coco", "COCO captions and retrieval, Karpathy's split", "dataset_coco.json"),
    _converter("flickr30k", "Flickr30k captions and retrieval, Karpathy's split", "dataset_flickr30k.json"),
)

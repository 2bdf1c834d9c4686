"""RefCOCO, RefCOCO+ and RefCOCOg, with one item per referring expression."""

from __future__ import annotations

from collections.abc import Iterator

from mplug2_fast.datasets.converters.base import AnnotationFile, Annotations, Converter, normalised_box
from mplug2_fast.datasets.converters.reading import Record, json_object, pickled_records
from mplug2_fast.datasets.items import Item

INSTANCES = AnnotationFile("instances", ("instances.json",), required=True)
SPLITS = {name: name for name in ("train", "val", "test", "testA", "testB")}


def image_sizes(instances: Record) -> dict[int, tuple[str, float, float]]:
    """Number of an image -> (file name, width, height), from COCO's instances.json."""
    return {
        int(image.number("id")): (image.text("file_name"), _positive(image, "width"), _positive(image, "height"))
        for image in instances.records("images")
    }


def _positive(record: Record, name: str) -> float:
    number = record.number(name)
    if number <= 0:
        raise record.error(f"{name} must be above 0, got {number:g}")
    return number


def _items(annotations: Annotations) -> Iterator[tuple[str, Item]]:
    instances = json_object(annotations.path("instances"))
    images = image_sizes(instances)
    boxes = {int(record.number("id")): record.values.get("bbox") for record in instances.records("annotations")}
    for record in pickled_records(annotations.path("refs")):
        image, box = int(record.number("image_id")), int(record.number("ann_id"))
        for name, number, known in (("image_id", image, images), ("ann_id", box, boxes)):
            if number not in known:
                raise record.error(f"unknown {name} {number}: {instances.file} does not have it")
        file, width, height = images[image]
        for sentence in record.records("sentences"):
            yield (
                record.choice("split", SPLITS),
                Item(
                    id=sentence.name("sent_id"),
                    image=annotations.media.path(file),
                    text=sentence.text("sent", "raw"),
                    box=normalised_box(record, boxes[box], (width, height)),
                ),
            )


CONVERTERS = (
    Converter(
        "refcoco",
        "RefCOCO, RefCOCO+, RefCOCOg",
        (AnnotationFile("refs", ("refs(*).p",), required=True), INSTANCES),
        ("image", "text", "box"),
        tuple(SPLITS),
        _items,
        "files of lichengunc/refer: one folder for each of the three, with the splits unc, google or umd",
    ),
)

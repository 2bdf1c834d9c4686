"""DiDeMo retrieval: the captions of the moments of a video, joined into one paragraph."""

from __future__ import annotations

from collections.abc import Iterator

from mplug2_fast.datasets.converters.base import AnnotationFile, Annotations, Converter, grouped
from mplug2_fast.datasets.converters.reading import json_records
from mplug2_fast.datasets.items import Item


def _items(annotations: Annotations) -> Iterator[tuple[str, Item]]:
    moments = grouped(
        (split, record.text("video"), (record.text("description"),))
        for split, path in annotations.each()
        for record in json_records(path)
    )
    for (split, video), descriptions in moments.items():
        paragraph = " ".join(descriptions)
        yield split, Item(id=video, video=annotations.media.path(video), caption=(paragraph,))


CONVERTERS = (
    Converter(
        "didemo",
        "DiDeMo, one paragraph per video",
        (
            AnnotationFile("train", ("train_data.json",)),
            AnnotationFile("val", ("val_data.json",)),
            AnnotationFile("test", ("test_data.json",)),
        ),
        ("video", "caption"),
        ("train", "val", "test"),
        _items,
        "files of LisaAnne/LocalizingMoments; inferred: captions are joined in the order of the file, with a space",
    ),
)

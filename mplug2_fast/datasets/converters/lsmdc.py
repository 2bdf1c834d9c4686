"""LSMDC retrieval and captions. A clip may have several sentences in the training file."""

from __future__ import annotations

from collections.abc import Iterator

from mplug2_fast.datasets.converters.base import AnnotationFile, Annotations, Converter, grouped
from mplug2_fast.datasets.converters.reading import table
from mplug2_fast.datasets.items import Item

COLUMNS = ("clip", "start_aligned", "end_aligned", "start_extracted", "end_extracted", "sentence")


def _items(annotations: Annotations) -> Iterator[tuple[str, Item]]:
    sentences = grouped(
        (split, row.text("clip"), (row.text("sentence"),))
        for split, path in annotations.each()
        for row in table(path, "\t", header=COLUMNS)
    )
    for (split, clip), captions in sentences.items():
        movie = clip.rpartition("_")[0]
        yield split, Item(id=clip, video=annotations.media.path(f"{movie}/{clip}.avi"), caption=captions)


CONVERTERS = (
    Converter(
        "lsmdc",
        "LSMDC",
        (
            AnnotationFile("train", ("LSMDC16_annos_training.csv",)),
            AnnotationFile("val", ("LSMDC16_annos_val.csv",)),
            AnnotationFile("test", ("LSMDC16_challenge_1000_publictect.csv",)),
        ),
        ("video", "caption"),
        ("train", "val", "test"),
        _items,
        "files of the 2016 challenge: six columns, separated by tabs, without a header",
    ),
)

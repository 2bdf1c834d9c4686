"""Kinetics-400, -600 and -700."""

from __future__ import annotations

from mplug2_fast.datasets.converters.base import AnnotationFile, Annotations, Converter, per_file
from mplug2_fast.datasets.converters.reading import Record, table
from mplug2_fast.datasets.items import Item


def _item(record: Record, annotations: Annotations, name: str) -> Item:
    """Takes the clip, unless there is only the whole video."""
    video, start, end = record.text("youtube_id"), record.number("time_start"), record.number("time_end")
    if end <= start:
        raise record.error(f"time_end must be after time_start, got {start:g} and {end:g}")
    clip = f"{video}_{int(start):06d}_{int(end):06d}"
    cut = annotations.media.has(f"{clip}.mp4") or not annotations.media.has(f"{video}.mp4")
    return Item(
        id=clip,
        video=annotations.media.path(f"{clip if cut else video}.mp4"),
        start=None if cut else start,
        end=None if cut else end,
        label=record.text("label") if "label" in record or not name.startswith("test") else None,
    )


CONVERTERS = (
    Converter(
        "kinetics",
        "Kinetics-400, -600, -700",
        (
            AnnotationFile("train", ("train.csv", "kinetics*_train.csv")),
            AnnotationFile("val", ("val.csv", "validate.csv", "kinetics*_val*.csv")),
            AnnotationFile("test", ("test.csv", "kinetics*_test.csv")),
        ),
        ("video", "label"),
        ("train", "val", "test"),
        per_file(lambda path: table(path, ",", quotes=True), _item),
        "files of DeepMind, with the columns label, youtube_id, time_start, time_end, split; clips named "
        "ID_START_END.mp4 as cvdfoundation/kinetics-dataset does",
    ),
)

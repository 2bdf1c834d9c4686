"""MSVD: captions, and MSVD-QA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mplug2_fast.datasets.converters.base import AnnotationFile, Annotations, Converter
from mplug2_fast.datasets.converters.msrvtt import question_item
from mplug2_fast.datasets.converters.reading import Record, json_records, lines, read_pickle, table
from mplug2_fast.datasets.items import Item
from mplug2_fast.errors import DataError

MAPPING = AnnotationFile("mapping", ("youtube_mapping.txt",))
LAST_TRAIN, LAST_VAL = 1200, 1300
"""Numbers of the last videos of the splits, in the order of youtube_mapping.txt."""


def _captions(annotations: Annotations) -> Iterator[tuple[str, Item]]:
    captions: dict[str, list[str]] = {}
    for clip, caption in _sentences(annotations):
        captions.setdefault(clip, []).append(caption)
    splits = _splits(annotations)
    for where, clip, split in splits:
        if clip not in captions:
            raise DataError(f"{where}: unknown video {clip!r}: {annotations.path('captions')} has no caption of it")
        yield split, Item(id=clip, video=annotations.media.path(f"{clip}.avi"), caption=tuple(captions[clip]))
    for _ in captions.keys() - {clip for _, clip, _ in splits}:
        annotations.skip("videos in no split")


def _sentences(annotations: Annotations) -> Iterator[tuple[str, str]]:
    """(clip, caption) in the order of the file. The extension decides how the file is read."""
    path = annotations.path("captions")
    if path.suffix == ".txt":
        for where, line in lines(path):
            clip, _, caption = line.partition(" ")
            if not caption:
                raise DataError(f"{where}: must be a clip, a space and a caption, got {line!r}")
            yield clip, caption.strip()
    elif path.suffix == ".csv":
        for row in table(path, ",", quotes=True):
            if row.text("Language") == "English" and row.text("Description"):
                yield "_".join(row.name(name) for name in ("VideoID", "Start", "End")), row.text("Description")
    else:
        clips = Record(read_pickle(path), str(path))
        for clip in clips.values:
            for words in clips.lists(clip):
                yield str(clip), " ".join(words)


def _splits(annotations: Annotations) -> list[tuple[str, str, str]]:
    """(place, clip, split), from lists of clips, or by the numbers of the mapping."""
    listed = [
        (where, line, split)
        for split in ("train", "val", "test")
        for path in (annotations.paths(split) if split in annotations else ())
        for where, line in lines(path)
    ]
    if listed:
        return listed
    if MAPPING.role not in annotations:
        raise DataError("msvd-captions needs youtube_mapping.txt, or train_list.txt, val_list.txt and test_list.txt")
    numbers = _mapping(annotations.path(MAPPING.role))
    return [
        (where, clip, "train" if number <= LAST_TRAIN else "val" if number <= LAST_VAL else "test")
        for number, (where, clip) in numbers.items()
    ]


def _mapping(path: Path) -> dict[int, tuple[str, str]]:
    """Number of a video -> (place, clip)."""
    numbers = {}
    for where, line in lines(path):
        clip, _, name = line.partition(" ")
        number = name.strip().removeprefix("vid")
        if not number.isdecimal():
            raise DataError(f"{where}: must be a clip, a space and a name such as vid1, got {line!r}")
        numbers[int(number)] = (where, clip)
    return numbers


def _questions(annotations: Annotations) -> Iterator[tuple[str, Item]]:
    numbers = _mapping(annotations.path(MAPPING.role))
    for role, path in annotations.each():
        for record in json_records(path) if role != MAPPING.role else ():
            number = int(record.number("video_id"))
            if number not in numbers:
                raise record.error(f"unknown video_id {number}: {annotations.path(MAPPING.role)} has no vid{number}")
            yield role, question_item(record, annotations.media.path(f"{numbers[number][1]}.avi"))


CONVERTERS = (
    Converter(
        "msvd-captions",
        "MSVD captions",
        (
            AnnotationFile(
                "captions",
                ("AllVideoDescriptions.txt", "MSR Video Description Corpus.csv", "raw-captions.pkl"),
                required=True,
            ),
            MAPPING,
            AnnotationFile("train", ("train_list.txt",)),
            AnnotationFile("val", ("val_list.txt",)),
            AnnotationFile("test", ("test_list.txt",)),
        ),
        ("video", "caption"),
        ("train", "val", "test"),
        _captions,
        "files of Chen and Dolan (2011); lists of collaborative-experts; 1,200 / 100 / 670 videos",
    ),
    Converter(
        "msvd-qa",
        "MSVD-QA",
        (
            AnnotationFile("train", ("train_qa.json",)),
            AnnotationFile("val", ("val_qa.json",)),
            AnnotationFile("test", ("test_qa.json",)),
            AnnotationFile(MAPPING.role, MAPPING.names, required=True),
        ),
        ("video", "question", "answers"),
        ("train", "val", "test"),
        _questions,
        "files of Xu et al. (2017), xudejing/video-question-answering",
    ),
)

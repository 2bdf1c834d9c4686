"""The annotation files of the official code of mPLUG and mPLUG-2.

They have no official names, so the name of a file must contain its split, or its role must be given: `train=FILE`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mplug2_fast.datasets.converters.base import (
    AnnotationFile,
    Annotations,
    Converter,
    grouped,
    normalised_box,
    per_file,
)
from mplug2_fast.datasets.converters.nlvr2 import LABELS as TRUTH
from mplug2_fast.datasets.converters.reading import Record, json_either, json_object, read_pickle
from mplug2_fast.datasets.converters.refcoco import INSTANCES, image_sizes
from mplug2_fast.datasets.converters.snli_ve import LABELS as ENTAILMENT
from mplug2_fast.datasets.converters.visual_genome import WEIGHT as VISUAL_GENOME_WEIGHT
from mplug2_fast.datasets.converters.vqav2 import shares
from mplug2_fast.datasets.items import Item
from mplug2_fast.errors import DataError, printable

SPLITS = ("train", "val", "test")
EXTENSION = "mp4"
_WORDS = {"train": ("train",), "val": ("val", "dev"), "test": ("test",)}
_FILES = tuple(AnnotationFile(split, tuple(f"*{word}*.json*" for word in _WORDS[split])) for split in SPLITS)


def _video(name: str) -> str:
    return name if PurePosixPath(name).suffix else f"{name}.{EXTENSION}"


def _captions(media: str, *names: str, captions: tuple[str, ...] = ("caption",)) -> Callable[..., Any]:
    """`Converter.items` of a file with a medium and its captions on each line, or one of them."""

    def items(annotations: Annotations) -> Iterator[tuple[str, Item]]:
        found = grouped(
            (split, record.name(*names), record.texts(*captions))
            for split, path in annotations.each()
            for record in json_either(path)
        )
        for (split, name), texts in found.items():
            path = annotations.media.path(_video(name) if media == "video" else name)
            video, image = (path, None) if media == "video" else (None, path)
            yield split, Item(id=name, video=video, image=image, caption=texts)

    return items


def _video_pair(record: Record, annotations: Annotations, name: str) -> Item:
    return Item(
        id=name,
        video=annotations.media.path(_video(record.name("video_id"))),
        start=_seconds(record, "start_time"),
        end=_seconds(record, "end_time"),
        caption=record.texts("caption"),
    )


def _seconds(record: Record, name: str) -> float | None:
    """Seconds, or hours, minutes and seconds with colons between them."""
    if name not in record:
        return None
    parts = str(record.values[name]).split(":")
    try:
        return sum(float(part) * float(60**power) for power, part in enumerate(reversed(parts)))
    except ValueError:
        raise record.error(f"{name} must be seconds or hours:minutes:seconds, got {parts!r}") from None


def _question(record: Record, annotations: Annotations, name: str) -> Item:
    return Item(
        id=record.name("question_id", "id") if "question_id" in record or "id" in record else name,
        video=annotations.media.path(_video(record.name("video_id", "video"))),
        question=record.text("question"),
        answers={record.text("answer"): 1.0},
    )


def _image_question(record: Record, annotations: Annotations, name: str) -> Item:
    source = record.text("dataset") if "dataset" in record else "vqa"
    answers: dict[str, float] = {}
    if "answer" in record or name.startswith("train"):
        answers = shares(record.texts("answer"))
        if source in ("vg", "gqa"):
            answers = {answer: weight * VISUAL_GENOME_WEIGHT for answer, weight in answers.items()}
    number = record.name("question_id") if "question_id" in record else name
    return Item(
        id=number if source == "vqa" else f"{source}-{number}",
        image=annotations.media.path(record.text("image")),
        question=record.text("question"),
        answers=answers,
        extra={each: record.values[each] for each in ("ocr", "object_label") if record.values.get(each) is not None},
    )


def _coco_captions(record: Record, annotations: Annotations, name: str) -> Item:
    image = f"{record.text('filepath')}/{record.text('filename')}" if "filepath" in record else record.text("filename")
    return Item(
        id=PurePosixPath(image).stem,
        image=annotations.media.path(image),
        caption=tuple(sentence.text("raw") for sentence in record.records("sentences")),
        extra={"object_label": record.text("object_label")} if record.values.get("object_label") else {},
    )


def _entailment(record: Record, annotations: Annotations, name: str) -> Item:
    image = annotations.media.path(record.text("image"))
    return Item(id=name, image=image, text=record.text("sentence"), label=record.choice("label", ENTAILMENT))


def _two_images(record: Record, annotations: Annotations, name: str) -> Item:
    images = record.texts("images")
    if len(images) != 2:
        raise record.error(f"images must be two paths, got {len(images)}")
    return Item(
        id=name,
        images=tuple(map(annotations.media.path, images)),
        text=record.text("sentence"),
        label=record.choice("label", TRUTH),
    )


def _phrases(path: Path) -> Iterator[Record]:
    rows = read_pickle(path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: must be a list of (file, name, box, phrase, attributes), got {type(rows).__name__}")
    for index, row in enumerate(rows):
        if not isinstance(row, list | tuple) or len(row) < 4:
            what = printable(repr(row), 80)
            raise DataError(f"{path}: [{index}]: must be (file, name, box, phrase, attributes), got {what}")
        yield Record({"file": row[0], "box": row[2], "phrase": row[3]}, str(path), f"[{index}]")


def _grounding(annotations: Annotations) -> Iterator[tuple[str, Item]]:
    instances = json_object(annotations.path("instances"))
    sizes = {file: (width, height) for file, width, height in image_sizes(instances).values()}
    for split, path in annotations.each():
        for index, record in enumerate(_phrases(path) if split != "instances" else ()):
            file = record.text("file")
            if file not in sizes:
                raise record.error(f"unknown file {file!r}: {instances.file} does not have its size")
            box = normalised_box(record, record.values["box"], sizes[file])
            image = annotations.media.path(file)
            yield split, Item(id=f"{split}-{index}", image=image, text=record.text("phrase"), box=box)


def _converter(
    name: str,
    title: str,
    fields: str,
    items: Callable[..., Any],
    files: tuple[AnnotationFile, ...] = _FILES,
) -> Converter:
    return Converter(
        f"mplug2-{name}",
        f"official mPLUG-2 form: {title}",
        files,
        tuple(fields.split()),
        tuple(file.role for file in files if file.role != INSTANCES.role),
        items,
        "the official code of mPLUG and mPLUG-2",
    )


_GROUNDING_FILES = (
    *(AnnotationFile(split, (f"*_{split}.pth",)) for split in (*SPLITS, "testA", "testB")),
    INSTANCES,
)

CONVERTERS = (
    _converter("retrieval", "video retrieval", "video caption", _captions("video", "clip_name", "video")),
    _converter("qa", "video QA", "video question answers", per_file(json_either, _question)),
    _converter(
        "captions",
        "video captions",
        "video caption",
        _captions("video", "video_id", "image_id", captions=("golden_captions", "golden_caption", "caption")),
    ),
    _converter("image-pairs", "images and captions", "image caption", _captions("image", "image")),
    _converter("video-pairs", "videos and captions", "video caption", per_file(json_either, _video_pair)),
    _converter("vqa", "image QA", "image question answers", per_file(json_either, _image_question)),
    _converter("coco-captions", "COCO captions", "image caption", per_file(json_either, _coco_captions)),
    _converter("entailment", "visual entailment", "image text label", per_file(json_either, _entailment)),
    _converter("nlvr2", "NLVR2", "images text label", per_file(json_either, _two_images)),
    _converter("grounding", "grounding", "image text box", _grounding, _GROUNDING_FILES),
)

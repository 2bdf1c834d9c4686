"""MSRVTT captions and MSRVTT-QA, with the three splits that papers use.

Scores on different splits cannot be compared, and papers do not always name their split.
"""

from __future__ import annotations

from collections.abc import Iterator

from mplug2_fast.datasets.converters.base import AnnotationFile, Annotations, Converter
from mplug2_fast.datasets.converters.reading import Record, json_object, json_records, table
from mplug2_fast.datasets.items import Item
from mplug2_fast.errors import DataError

CHOICES = {
    "official": "train 6,513, val 497, test 2,990 videos",
    "7k": "train 7,010 (train and val together), test 2,990 videos",
    "1k-A": "train 9,000, test 1,000 videos with one caption each (JSFusion's)",
}
LISTS = (
    AnnotationFile("train-videos", ("MSRVTT_train.9k.csv",)),
    AnnotationFile("test-videos", ("MSRVTT_JSFUSION_test.csv",)),
)
SPLITS = {"train": "train", "validate": "val", "val": "val", "test": "test"}


def _captions(annotations: Annotations) -> Iterator[tuple[str, Item]]:
    splits: dict[str, str] = {}
    captions: dict[str, list[str]] = {}
    for role, path in annotations.each():
        if role in ("train-videos", "test-videos"):
            continue
        info = json_object(path)
        for video in info.records("videos"):
            name = video.text("video_id")
            if name in splits:
                raise video.error(f"the video_id {name!r} is repeated: give each video once")
            splits[name] = video.choice("split", SPLITS)
        for sentence in info.records("sentences"):
            name = sentence.text("video_id")
            if name not in splits:
                raise sentence.error(f"unknown video_id {name!r}: no entry of videos has it")
            captions.setdefault(name, []).append(sentence.text("caption"))
    if not splits:
        raise DataError("msrvtt-captions needs train_val_videodatainfo.json, test_videodatainfo.json or both")
    split_of = _Splitter(annotations)
    if annotations.choice == "1k-A":
        for row in _test_videos(annotations):
            name = row.text("video_id")
            if name not in captions:
                raise row.error(f"unknown video_id {name!r}: give test_videodatainfo.json too")
            captions[name] = [row.text("sentence")]
    for name, official in splits.items():
        split = split_of(name, official)
        if split is not None and name not in captions:
            annotations.skip("videos without a caption")
        elif split is not None:
            yield split, Item(id=name, video=annotations.media.path(f"{name}.mp4"), caption=tuple(captions[name]))


def _questions(annotations: Annotations) -> Iterator[tuple[str, Item]]:
    split_of = _Splitter(annotations)
    for role, path in annotations.each():
        for record in json_records(path) if role in ("train", "val", "test") else ():
            name = record.name("video_id")
            name = name if name.startswith("video") else f"video{name}"
            split = split_of(name, role)
            if split is not None:
                yield split, question_item(record, annotations.media.path(f"{name}.mp4"))


def question_item(record: Record, video: str) -> Item:
    """The item of an entry of a file such as train_qa.json."""
    answers = {record.text("answer"): 1.0}
    return Item(id=record.name("id"), video=video, question=record.text("question"), answers=answers)


class _Splitter:
    """(name of a video, its official split) -> its split; None if it is in no split."""

    def __init__(self, annotations: Annotations) -> None:
        self._annotations = annotations
        self._choice = annotations.choice
        if self._choice == "1k-A":
            self._test = {row.text("video_id") for row in _test_videos(annotations)}
            self._train = None
            if "train-videos" in annotations:
                rows = table(annotations.path("train-videos"), ",", quotes=True)
                self._train = {row.text("video_id") for row in rows}

    def __call__(self, name: str, official: str) -> str | None:
        if self._choice == "official":
            return official
        if self._choice == "7k":
            return "test" if official == "test" else "train"
        if name in self._test:
            return "test"
        if self._train is None or name in self._train:
            return "train"
        self._annotations.skip("videos in neither list of the split")
        return None


def _test_videos(annotations: Annotations) -> Iterator[Record]:
    return table(annotations.path("test-videos"), ",", quotes=True)


CONVERTERS = (
    Converter(
        "msrvtt-captions",
        "MSRVTT captions",
        (
            AnnotationFile("captions", ("train_val_videodatainfo.json", "MSRVTT_data.json")),
            AnnotationFile("test-captions", ("test_videodatainfo.json",)),
            *LISTS,
        ),
        ("video", "caption"),
        ("train", "val", "test"),
        _captions,
        "files of the 2016 challenge; the lists of 1k-A as CLIP4Clip and later retrieval work distribute them",
        CHOICES,
    ),
    Converter(
        "msrvtt-qa",
        "MSRVTT-QA",
        (
            AnnotationFile("train", ("train_qa.json",)),
            AnnotationFile("val", ("val_qa.json",)),
            AnnotationFile("test", ("test_qa.json",)),
            *LISTS,
        ),
        ("video", "question", "answers"),
        ("train", "val", "test"),
        _questions,
        "files of Xu et al. (2017), xudejing/video-question-answering",
        CHOICES,
    ),
)

"""TGIF-QA, the questions about one frame (FrameQA)."""

from __future__ import annotations

from mplug2_fast.datasets.converters.base import AnnotationFile, Annotations, Converter, per_file
from mplug2_fast.datasets.converters.reading import Record, table
from mplug2_fast.datasets.items import Item


def _item(record: Record, annotations: Annotations, name: str) -> Item:
    video = annotations.media.path(f"{record.text('gif_name')}.gif")
    return Item(id=name, video=video, question=record.text("question"), answers={record.text("answer"): 1.0})


CONVERTERS = (
    Converter(
        "tgif-qa",
        "TGIF-QA FrameQA",
        (
            AnnotationFile("train", ("Train_frameqa_question.csv",)),
            AnnotationFile("test", ("Test_frameqa_question.csv",)),
        ),
        ("video", "question", "answers"),
        ("train", "test"),
        per_file(lambda path: table(path, "\t", quotes=True), _item),
        "files of YunseokJANG/tgif-qa; only the columns gif_name, question and answer are read",
    ),
)

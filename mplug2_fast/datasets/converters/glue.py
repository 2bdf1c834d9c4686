"""GLUE: sentences and pairs of sentences, with a class or a number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mplug2_fast.datasets.converters.base import AnnotationFile, Annotations, Converter, skip_some
from mplug2_fast.datasets.converters.reading import Record, table
from mplug2_fast.datasets.items import Item

USUAL_FILES = {"train": "train.tsv", "val": "dev.tsv", "test": "test.tsv"}
ENTAILMENT = {name: name for name in ("entailment", "not_entailment")}


@dataclass(frozen=True)
class _Task:
    """The columns of a task, and the classes of its labels. Without classes a label is a number."""

    name: str
    title: str
    text: str
    pair: str | None = None
    label: str = "label"
    classes: dict[str, str] | None = None
    files: dict[str, str] | None = None
    header: tuple[str, ...] | None = None


TASKS = (
    _Task(
        "cola",
        "CoLA",
        "sentence",
        classes={"0": "unacceptable", "1": "acceptable"},
        header=("source", "label", "star", "sentence"),
    ),
    _Task("sst2", "SST-2", "sentence", classes={"0": "negative", "1": "positive"}),
    _Task(
        "mrpc",
        "MRPC",
        "#1 String",
        "#2 String",
        "Quality",
        {"0": "not_equivalent", "1": "equivalent"},
        USUAL_FILES | {"train": "train.tsv|msr_paraphrase_train.txt", "test": "test.tsv|msr_paraphrase_test.txt"},
    ),
    _Task("stsb", "STS-B", "sentence1", "sentence2", "score"),
    _Task("qqp", "QQP", "question1", "question2", "is_duplicate", {"0": "not_duplicate", "1": "duplicate"}),
    _Task(
        "mnli",
        "MNLI",
        "sentence1",
        "sentence2",
        "gold_label",
        {name: name for name in ("entailment", "neutral", "contradiction")},
        {
            "train": "train.tsv",
            "val-matched": "dev_matched.tsv",
            "val-mismatched": "dev_mismatched.tsv",
            "test-matched": "test_matched.tsv",
            "test-mismatched": "test_mismatched.tsv",
        },
    ),
    _Task("qnli", "QNLI", "question", "sentence", classes=ENTAILMENT),
    _Task("rte", "RTE", "sentence1", "sentence2", classes=ENTAILMENT),
    _Task("wnli", "WNLI", "sentence1", "sentence2", classes={"0": "not_entailment", "1": "entailment"}),
)


def _items(task: _Task, annotations: Annotations) -> Iterator[tuple[str, Item]]:
    for split, path in annotations.each():
        for number, row in enumerate(skip_some(annotations, partial(_rows, path, task, split))):
            yield split, _item(task, row, f"{split}-{number}", split)


def _rows(path: Path, task: _Task, split: str, **options: Any) -> Iterator[Record]:
    header = task.header if split in ("train", "val") else None
    return table(path, "\t", header=header, **options)


def _item(task: _Task, row: Record, name: str, split: str) -> Item:
    label: str | float | None = None
    if not split.startswith("test") or task.label in row:
        label = row.choice(task.label, task.classes) if task.classes else row.number(task.label)
    return Item(id=name, text=row.text(task.text), text_pair=row.text(task.pair) if task.pair else None, label=label)


def _converter(task: _Task) -> Converter:
    files = task.files or USUAL_FILES
    return Converter(
        f"glue-{task.name}",
        f"GLUE {task.title}",
        tuple(AnnotationFile(split, tuple(names.split("|"))) for split, names in files.items()),
        ("text", "text_pair", "label") if task.pair else ("text", "label"),
        tuple(files),
        partial(_items, task),
        "files of gluebenchmark.com: columns separated by tabs, without quotes",
    )


CONVERTERS = tuple(map(_converter, TASKS))

"""Finds mistakes in a data set before training."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mplug2_fast.datasets.items import Item, PathLike, file_of, scan_items
from mplug2_fast.datasets.media import Progress, same_contents, unreadable
from mplug2_fast.errors import DataError, printable
from mplug2_fast.text import Tokenizer, clean_caption, clean_question

MAX_WORDS = {"question": 50, "caption": 80}
"""Number of words that the official code reads of a text. It cuts off the rest."""

WARNINGS = frozenset({"long text", "repeated item", "repeated file", "id in two splits"})
"""Kinds of findings that are warnings. All others are errors."""

_BOX_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Finding:
    """A mistake.

    Attributes:
        kind: such as "missing file". Those in `WARNINGS` are warnings.
        place: file and line.
        message: a description.
    """

    kind: str
    place: str
    message: str

    @property
    def is_error(self) -> bool:
        """Whether it would harm training or scores."""
        return self.kind not in WARNINGS


@dataclass(frozen=True)
class Split:
    """The contents of a split.

    Attributes:
        items, files, captions, questions: their numbers.
        unseen_answers: number of questions whose best answer is the best answer of no question in training.
        labels: label -> number of items, the most frequent first. Numbers with a fraction are no labels.
    """

    items: int
    files: int
    captions: int
    questions: int
    unseen_answers: int
    labels: dict[str, int]


@dataclass(frozen=True)
class CheckResult:
    """The splits of a data set, and the findings."""

    splits: dict[str, Split]
    findings: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        """The findings that would harm training or scores."""
        return [finding for finding in self.findings if finding.is_error]

    @property
    def counts(self) -> dict[str, int]:
        """Kind -> number of findings, errors first."""
        counts = Counter(finding.kind for finding in self.findings)
        return dict(sorted(counts.items(), key=lambda each: each[0] in WARNINGS))

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        splits = {name: asdict(split) for name, split in self.splits.items()}
        return {"splits": splits, "counts": self.counts, "findings": [asdict(each) for each in self.findings]}


@dataclass(frozen=True)
class _Entry:
    """An item and its place."""

    split: str
    file: Path
    line: int
    item: Item

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def has_id(self) -> bool:
        """Whether its id is not just the number of its line."""
        return self.item.id != str(self.line)

    @property
    def is_train(self) -> bool:
        return self.split.startswith("train")

    @property
    def texts(self) -> list[tuple[str, str]]:
        """(field, text) of all texts."""
        item = self.item
        named = [("question", item.question), ("text", item.text), ("text_pair", item.text_pair)]
        named += [("caption", caption) for caption in item.caption] + [("answer", answer) for answer in item.answers]
        return [(name, text) for name, text in named if text is not None]


def check(
    data: PathLike,
    split: str | None = None,
    *,
    decode: bool = True,
    num_workers: int | None = None,
    timeout: float = 60.0,
    num_frames: int = 16,
    max_tokens: int = 512,
    progress: Progress | None = None,
) -> CheckResult:
    """Looks for mistakes that would harm training or evaluation.

    Args:
        data: a JSON Lines file, or a folder with one for each split.
        split: check only this split. Leaks between splits are then not found.
        decode: decode each media file. Otherwise only its structure is read, which is faster and finds less.
        num_workers: processes that decode. None takes the number of cores.
        timeout: seconds for each file.
        num_frames: number of frames to decode, spread over the video as in training.
        max_tokens: number of tokens that the model reads.
        progress: called with the number of media files done, and of all.

    Raises:
        DataError: there is no such data, or a file is not UTF-8 text.
    """
    findings: list[Finding] = []
    entries = list(_entries(Path(data), split, findings))
    if not entries and not findings:
        raise DataError(f"{data}: no items" if split is None else f"{data}: no items of the split {split!r}")
    findings += _repeated_ids(entries)
    findings += _items(entries, max_tokens)
    findings += _repeated_items(entries)
    findings += _leaks(entries)
    findings += _unseen_labels(entries)
    first = _first_places(entries)
    workers = num_workers or len(os.sched_getaffinity(0))
    options = {"decode": decode, "num_workers": workers, "timeout": timeout, "num_frames": num_frames}
    findings += _files(first, options, progress)
    return CheckResult(_summaries(entries), findings)


def _entries(data: Path, split: str | None, findings: list[Finding]) -> Iterator[_Entry]:
    """All items. Other lines become findings."""
    files = [file_of(data, split)] if split is not None or not data.is_dir() else sorted(data.glob("*.jsonl"))
    if not files:
        raise DataError(f"{data}: no .jsonl files in this folder: convert a data set first, or name a file")
    for file in files:
        for line, item in scan_items(file):
            if isinstance(item, DataError):
                place = f"{file}:{line}"
                findings.append(Finding("bad line", place, str(item).removeprefix(f"{place}: ")))
            elif split is None or item.split in (None, split):
                yield _Entry(item.split or split or file.stem, file, line, item)


def _repeated_ids(entries: Iterable[_Entry]) -> Iterator[Finding]:
    seen: dict[tuple[Path, str, str], _Entry] = {}
    for entry in entries:
        first = seen.setdefault((entry.file, entry.split, entry.item.id), entry)
        if first is not entry:
            name = printable(repr(entry.item.id), 80)
            yield Finding("repeated id", entry.place, f"the id {name} is also on line {first.line}")


def _items(entries: Iterable[_Entry], max_tokens: int) -> Iterator[Finding]:
    """Finds mistakes of single items."""
    texts = _TextCheck(max_tokens)
    for entry in entries:
        item = entry.item
        if not item.media and item.text is None:
            yield Finding("no input", entry.place, "has no video, image, images or text")
        elif entry.is_train and item.media and not _has_target(item):
            yield Finding("no target", entry.place, "has no caption, answer, label or box to learn")
        for name, text in entry.texts:
            yield from texts.findings(entry, name, text)
        if item.box is not None:
            x, y, width, height = item.box
            edges = (x - width / 2, y - height / 2, 1 - x - width / 2, 1 - y - height / 2)
            if min(edges) < -_BOX_TOLERANCE:
                yield Finding("box", entry.place, f"the box {list(item.box)} is partly outside of the image")


def _has_target(item: Item) -> bool:
    return bool(item.caption or item.answers or item.box or item.label is not None)


class _TextCheck:
    """Finds texts that are empty or longer than the model reads."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._cleaned = {"question": clean_question, "caption": clean_caption}

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_vocab()

    def findings(self, entry: _Entry, name: str, text: str) -> Iterator[Finding]:
        words = len(text.split())
        if not self._cleaned.get(name, str)(text).strip():
            yield Finding("empty text", entry.place, f"the {name} {printable(repr(text), 80)} has no words")
        elif words > MAX_WORDS.get(name, words):
            message = f"the {name} has {words} words; only the first {MAX_WORDS[name]} are read"
            yield Finding("long text", entry.place, message)
        elif len(text) + 2 > self._max_tokens:  # a token has at least one character, and two more mark the ends
            tokens = self._tokenizer.encode([text], end=True)[0].shape[1]
            if tokens > self._max_tokens:
                yield Finding("long text", entry.place, f"the {name} has {tokens} tokens, more than {self._max_tokens}")


def _repeated_items(entries: Iterable[_Entry]) -> Iterator[Finding]:
    seen: dict[object, _Entry] = {}
    for entry in entries:
        item = entry.item
        media = tuple(map(os.path.realpath, item.media))
        targets = (tuple(item.answers.items()), item.label, item.box)
        key = (entry.split, media, item.start, item.end, tuple(map(_normalised, entry.texts)), targets)
        first = seen.setdefault(key, entry)
        if first is not entry:
            yield Finding("repeated item", entry.place, f"has the same input and texts as line {first.line}")


def _normalised(named: tuple[str, str]) -> tuple[str, str]:
    return named[0], clean_caption(named[1], len(named[1]))


def _leaks(entries: Sequence[_Entry]) -> Iterator[Finding]:
    """Ids, media files and texts of training that are in another split too."""
    ids: dict[str, _Entry] = {}
    texts: dict[object, _Entry] = {}
    for entry in entries:
        if entry.is_train:
            ids.setdefault(entry.item.id, entry)
            if not entry.item.media:
                texts.setdefault(tuple(map(_normalised, entry.texts)), entry)
    media = _Media(entries)
    for entry in entries:
        if entry.is_train:
            continue
        if entry.has_id and entry.item.id in ids and ids[entry.item.id].has_id:
            name = printable(repr(entry.item.id), 80)
            message = f"the id {name} is also at {ids[entry.item.id].place}, in training"
            yield Finding("id in two splits", entry.place, message)
        for path in entry.item.media:
            if (other := media.in_training(path, entry.item)) is not None:
                yield Finding("leak", entry.place, f"{path} is also at {other.place}, in training")
        if not entry.item.media and (other := texts.get(tuple(map(_normalised, entry.texts)))) is not None:
            yield Finding("leak", entry.place, f"the same text is at {other.place}, in training")


class _Media:
    """Media file -> items in training that show the same part of it."""

    def __init__(self, entries: Iterable[_Entry]) -> None:
        self._entries: dict[str, list[_Entry]] = defaultdict(list)
        for entry in entries:
            for path in entry.item.media if entry.is_train else ():
                self._entries[os.path.realpath(path)].append(entry)

    def in_training(self, path: str, item: Item) -> _Entry | None:
        """The first item in training that overlaps this one in time."""
        start, end = item.start or 0.0, item.end or float("inf")
        return next(
            (
                other
                for other in self._entries.get(os.path.realpath(path), ())
                if (other.item.start or 0.0) < end and start < (other.item.end or float("inf"))
            ),
            None,
        )


def _unseen_labels(entries: Sequence[_Entry]) -> Iterator[Finding]:
    known = {label for entry in entries if entry.is_train and (label := _class_of(entry.item)) is not None}
    unseen: dict[str, list[_Entry]] = {}
    for entry in entries:
        label = _class_of(entry.item)
        if known and label is not None and label not in known:
            unseen.setdefault(label, []).append(entry)
    for label, with_it in unseen.items():
        items = "1 item" if len(with_it) == 1 else f"{len(with_it):,} items"
        name = printable(repr(label), 80)
        yield Finding("unseen label", with_it[0].place, f"the label {name} of {items} is not in training")


def _class_of(item: Item) -> str | None:
    return None if item.label is None or isinstance(item.label, float) else str(item.label)


def _first_places(entries: Iterable[_Entry]) -> dict[str, dict[str, _Entry]]:
    """Media file -> split -> the first item that names it."""
    first: dict[str, dict[str, _Entry]] = {}
    spelled: dict[str, str] = {}
    for entry in entries:
        for path in entry.item.media:
            first.setdefault(spelled.setdefault(os.path.realpath(path), path), {}).setdefault(entry.split, entry)
    return first


def _files(
    first: dict[str, dict[str, _Entry]], options: dict[str, Any], progress: Progress | None
) -> Iterator[Finding]:
    """Files that cannot be read, and files that are the same."""
    reasons = dict(unreadable(list(first), **options, progress=progress))
    for path in filter(reasons.__contains__, first):  # files are ready in any order
        place = next(iter(first[path].values())).place
        kind = "unreadable file" if os.path.exists(path) else "missing file"
        yield Finding(kind, place, f"{path}: {reasons[path]}")
    for group in same_contents(list(first)):
        places = [(path, entry) for path in group for entry in first[path].values()]
        places.sort(key=lambda each: (not each[1].is_train, each[1].file, each[1].line))
        path, entry = places[0]
        same = f"has the same contents as {path}, at {entry.place}"
        for other_path, other in places:
            if other_path == path:
                continue
            if not entry.is_train or other.is_train:
                yield Finding("repeated file", other.place, f"{other_path} {same}")
            elif not any(each.is_train for each in first[other_path].values()):  # else `_leaks` finds it
                yield Finding("leak", other.place, f"{other_path} {same}, in training")


def _summaries(entries: Sequence[_Entry]) -> dict[str, Split]:
    trained = {_best_answer(entry.item) for entry in entries if entry.is_train and entry.item.answers}
    splits: dict[str, list[Item]] = {}
    for entry in entries:
        splits.setdefault(entry.split, []).append(entry.item)
    return {
        name: Split(
            items=len(items),
            files=len({os.path.realpath(path) for item in items for path in item.media}),
            captions=sum(len(item.caption) for item in items),
            questions=sum(item.question is not None for item in items),
            unseen_answers=sum(bool(trained and item.answers) and _best_answer(item) not in trained for item in items),
            labels=dict(Counter(label for item in items if (label := _class_of(item)) is not None).most_common()),
        )
        for name, items in splits.items()
    }


def _best_answer(item: Item) -> str:
    return max(item.answers, key=lambda answer: item.answers[answer])

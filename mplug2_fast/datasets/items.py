"""Items of a data set, and their JSON Lines files."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from mplug2_fast.errors import DataError, printable

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Item:
    """One item: an input and its annotations. Fields that do not apply are empty.

    Attributes:
        id: unique within a split.
        video, image, images: paths of the input. In a JSON Lines file they are relative to its folder.
        start, end: the part of the video, in seconds.
        text, text_pair: input texts, such as a referring expression or a sentence pair.
        caption: all captions.
        question: about the video or image.
        answers: answer -> weight. The weights of several annotators sum to 1.
        box: (center x, center y, width, height), each in [0, 1] of the image.
        label: class name, truth value or number.
        task: name of the task, if one file serves several.
        split: "train", "val", "test", or a name of the data set's own.
        extra: further fields of the line, unchanged.
    """

    id: str
    video: str | None = None
    image: str | None = None
    images: tuple[str, ...] = ()
    start: float | None = None
    end: float | None = None
    text: str | None = None
    text_pair: str | None = None
    caption: tuple[str, ...] = ()
    question: str | None = None
    answers: Mapping[str, float] = field(default_factory=dict)
    box: tuple[float, float, float, float] | None = None
    label: str | int | float | bool | None = None
    task: str | None = None
    split: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def media(self) -> tuple[str, ...]:
        """The paths of all inputs that are files."""
        return tuple(path for path in (self.video, self.image, *self.images) if path is not None)

    def to_json(self) -> dict[str, Any]:
        """The fields that are not empty. One caption is a text, one answer of weight 1 is an `answer`."""
        line: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if value is None or value in ((), {}) or each.name == "extra":
                continue
            line[each.name] = list(value) if isinstance(value, tuple) else value
        if len(self.caption) == 1:
            line["caption"] = self.caption[0]
        if len(self.answers) == 1 and next(iter(self.answers.values())) == 1:
            del line["answers"]
            line["answer"] = next(iter(self.answers))
        elif self.answers:
            line["answers"] = dict(self.answers)
        return {**line, **self.extra}

    @classmethod
    def from_json(cls, line: Mapping[str, Any], default_id: str = "") -> Item:
        """Makes an item from the fields of a line. A field that is null counts as missing.

        Raises:
            DataError: a field has an impossible value, or a name that is probably a misspelt field.
        """
        line = {name: value for name, value in line.items() if value is not None}
        known = {name: value for name, value in line.items() if name in _CHECKS}
        extra = {name: value for name, value in line.items() if name not in known and name != "answer"}
        for name in extra:
            near = _near(name)
            if near and near not in line:
                raise DataError(f"unknown field {printable(repr(name))}: did you mean {near!r}?")
        if "answer" in line:
            if "answers" in line:
                raise DataError("has both answer and answers: keep one of them")
            known["answers"] = {_text("answer", line["answer"]): 1.0}
        known.setdefault("id", default_id)
        item = cls(**{name: _CHECKS[name](name, value) for name, value in known.items()}, extra=extra)
        if item.start is not None and item.end is not None and item.end <= item.start:
            raise DataError(f"end must be after start, got start {item.start:g} and end {item.end:g}")
        return item


def read_items(path: PathLike, split: str | None = None) -> list[Item]:
    """The items of a JSON Lines file, or of `SPLIT.jsonl` in a folder. Media paths are joined with its folder.

    Args:
        path: a file, or a folder with one file per split.
        split: keep only the items of this split. In a file, items without the field belong to every split.

    Raises:
        DataError: there is no such file, a line is not an item, or two items have the same id. The message has file
            and line.
    """
    file = file_of(Path(path), split)
    items: list[Item] = []
    seen: dict[tuple[str, str | None], int] = {}
    for number, item in scan_items(file):
        if isinstance(item, DataError):
            raise item
        if split is not None and item.split not in (None, split):
            continue
        first = seen.setdefault((item.id, item.split), number)
        if first != number:
            raise DataError(
                f"{file}:{number}: the id {printable(repr(item.id))} is also on line {first}: make ids unique"
            )
        items.append(item)
    if not items:
        what = "no items" if split is None else f"no items of the split {split!r}"
        raise DataError(f"{file}: {what}")
    return items


def scan_items(file: Path) -> Iterator[tuple[int, Item | DataError]]:
    """(line number, the item or the error) of each line of a JSON Lines file.

    Media paths are joined with the folder of the file.

    Raises:
        DataError: the file cannot be read, or is not UTF-8 text.
    """
    folder = "" if file.parent == Path() else os.fspath(file.parent)
    for number, line in _lines(file):
        try:
            yield number, Item.from_json(_joined(_parsed(line), folder), default_id=str(number))
        except DataError as error:
            yield number, DataError(f"{file}:{number}: {error}")


def write_items(path: PathLike, items: Iterable[Item]) -> int:
    """Writes a JSON Lines file atomically. Returns the number of items.

    Raises:
        DataError: the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            for item in items:
                file.write(json.dumps(item.to_json(), ensure_ascii=False) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, UnicodeEncodeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = error.strerror if isinstance(error, OSError) else f"an item has {error.object[error.start]!r}"
        raise DataError(f"{path}: cannot be written: {reason}") from error
    return count


def file_of(path: Path, split: str | None) -> Path:
    """The JSON Lines file of a split: the path itself, or `SPLIT.jsonl` in this folder.

    Raises:
        DataError: there is no such file.
    """
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        return path
    if split is None:
        raise DataError(f"{path} is a folder: name a split ({_splits(path)}), or one of its .jsonl files")
    file = path / f"{split}.jsonl"
    if not file.exists():
        raise DataError(f"{path} has no split {split!r}; it has {_splits(path)}")
    return file


def _splits(folder: Path) -> str:
    return ", ".join(sorted(file.stem for file in folder.glob("*.jsonl"))) or "no .jsonl files"


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, and their numbers."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, text in enumerate(lines, 1):
                if text.strip():
                    yield number, text
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}: save it as UTF-8") from None


def _parsed(text: str) -> dict[str, Any]:
    try:
        line = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(line, dict):
        raise DataError(f'must be a JSON object such as {{"video": "a.mp4"}}, got {type(line).__name__}')
    return line


def _not_a_number(text: str) -> float:
    raise ValueError(f"{text} is not a number")


_DECODER = json.JSONDecoder(parse_constant=_not_a_number)


def _joined(line: dict[str, Any], folder: str) -> dict[str, Any]:
    """The fields of a line, with media paths that start at a folder."""
    for name in ("video", "image"):
        if isinstance(path := line.get(name), str):
            line[name] = os.path.join(folder, path)
    if isinstance(paths := line.get("images"), list):
        line["images"] = [os.path.join(folder, path) if isinstance(path, str) else path for path in paths]
    return line


@lru_cache(maxsize=1000)  # the lines of a file repeat their names
def _near(name: str) -> str | None:
    return next(iter(difflib.get_close_matches(name, [*_CHECKS, "answer"], n=1, cutoff=0.75)), None)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} must be a text, got {printable(repr(value), 80)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        what = printable(repr(value), 80)
        raise DataError(f"{name} has half characters, which no file can hold: {what}") from None
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    return tuple(_text(name, each) for each in (value if isinstance(value, list | tuple) else [value]))


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise DataError(f"{name} must be a number of at least 0, got {printable(repr(value), 80)}")
    return float(value)


def _id(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{name} must be a text or a whole number, got {printable(repr(value), 80)}")
    return str(value)


def _answers(name: str, value: Any) -> dict[str, float]:
    if isinstance(value, list | tuple) and value:
        texts = _texts(name, value)
        value = {text: texts.count(text) / len(texts) for text in texts}
    if not isinstance(value, Mapping) or not value:
        raise DataError(f"{name} must be an object of answer and weight, or a list, got {printable(repr(value), 80)}")
    weights = {_text(name, text): _number(f"the weight of {text!r}", weight) for text, weight in value.items()}
    if not any(weights.values()):
        raise DataError(f"{name}: the weights are all 0: give one of them more")
    return weights


def _box(name: str, value: Any) -> tuple[float, float, float, float]:
    numbers = tuple(_number(name, each) for each in value) if isinstance(value, list | tuple) else ()
    if len(numbers) != 4 or max(numbers) > 1 or min(numbers[2:]) == 0:
        shape = "[center x, center y, width, height], each from 0 to 1, and none of the last two 0"
        raise DataError(f"{name} must be {shape}, got {printable(repr(value), 80)}")
    return numbers[0], numbers[1], numbers[2], numbers[3]


def _label(name: str, value: Any) -> str | int | float | bool:
    if not isinstance(value, str | int | float | bool):
        raise DataError(f"{name} must be a text, a number or a truth value, got {printable(repr(value), 80)}")
    return value


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "id": _id,
    **dict.fromkeys(("video", "image", "text", "text_pair", "question", "task", "split"), _text),
    **dict.fromkeys(("images", "caption"), _texts),
    **dict.fromkeys(("start", "end"), _number),
    "answers": _answers,
    "box": _box,
    "label": _label,
}

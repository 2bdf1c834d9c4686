"""The base of converters, which make items from the annotation files of a data set."""

from __future__ import annotations

import fnmatch
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mplug2_fast.datasets.converters.reading import Record
from mplug2_fast.datasets.items import Item, PathLike, write_items
from mplug2_fast.errors import DataError, printable

MAX_SKIPPED_SHARE = 0.01
"""Maximum share of rows with a wrong number of columns. Official tables have a few."""


@dataclass(frozen=True)
class AnnotationFile:
    """A file that a converter reads.

    Attributes:
        role: its contents, such as "train". The command line uses it as the name: `train=FILE`.
        names: its official file names. `*` stands for anything.
        required: whether the conversion needs it.
    """

    role: str
    names: tuple[str, ...]
    required: bool = False

    def matches(self, path: Path) -> bool:
        """Whether a file has one of the names."""
        return any(fnmatch.fnmatchcase(path.name.lower(), name.lower()) for name in self.names)


@dataclass(frozen=True)
class Converter:
    """Makes items from the annotation files of one data set.

    Attributes:
        name: on the command line.
        title: the data set.
        files: the files that it reads, in the order of the items that are written.
        fields: the fields of its items.
        splits: the splits that it writes.
        items: (split, item) of all items.
        source: the source of the files, and what was inferred about their form.
        choices: name -> meaning of the ways to split the data set, the default first; empty if there is only one.
    """

    name: str
    title: str
    files: tuple[AnnotationFile, ...]
    fields: tuple[str, ...]
    splits: tuple[str, ...]
    items: Callable[[Annotations], Iterable[tuple[str, Item]]]
    source: str
    choices: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        files: the path of each split.
        counts: the number of items of each split.
        skipped: reason -> number of annotations that were left out.
        media: number of media files that the items name.
        missing: names of those that are not in the media folder.
    """

    files: dict[str, Path]
    counts: dict[str, int]
    skipped: dict[str, int]
    media: int
    missing: list[str]


class Media:
    """Finds the media files of items.

    Args:
        folder: the media folder, or None if it is unknown.
        out: the folder of the JSON Lines files. Paths in them are relative to it.
    """

    def __init__(self, folder: Path | None, out: Path) -> None:
        self.named: set[str] = set()
        self.missing: dict[str, None] = {}
        self._files: dict[str, str] = {}
        self._prefix = PurePosixPath()
        self._has_folder = folder is not None
        if folder is None:
            return
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder: --media names the folder of the videos or images")
        self._prefix = PurePosixPath(Path(os.path.relpath(folder, out)).as_posix())
        found = (Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names)
        for path in sorted(path.relative_to(folder) for path in found):
            for key in (path.as_posix(), path.name, path.stem):
                self._files.setdefault(key, path.as_posix())

    def has(self, name: str) -> bool:
        """Whether the folder has a file of this name, with any extension."""
        return self._find(name) is not None

    def path(self, name: str) -> str:
        """The path of a file, relative to the folder of the JSON Lines files.

        A file is found by its path, its name, or its name without the extension.
        """
        self.named.add(name)
        found = self._find(name)
        if found is None and self._has_folder:
            self.missing[name] = None
        return str(self._prefix / (found or name))

    def _find(self, name: str) -> str | None:
        path = PurePosixPath(name)
        return next((self._files[key] for key in (name, path.name, path.stem) if key in self._files), None)


class Annotations:
    """The files of a converter's data set, its media and its options."""

    def __init__(self, converter: Converter, paths: Mapping[str, Sequence[Path]], media: Media, choice: str) -> None:
        self.converter = converter
        self.media = media
        self.choice = choice
        self.skipped: Counter[str] = Counter()
        self._paths = paths

    def __contains__(self, role: str) -> bool:
        return role in self._paths

    def path(self, role: str) -> Path:
        """The file of a role.

        Raises:
            DataError: no file was given for the role, or more than one.
        """
        paths = self.paths(role)
        if len(paths) != 1:
            raise DataError(f"{self.converter.name}: {paths[1]}: only one file can be {role}, and {paths[0]} is")
        return paths[0]

    def paths(self, role: str) -> Sequence[Path]:
        """The files of a role. Raises `DataError` if none was given."""
        if role not in self._paths:
            raise DataError(f"{self.converter.name} needs {_described(self.converter, role)}")
        return self._paths[role]

    def each(self) -> Iterator[tuple[str, Path]]:
        """(role, path) of all files."""
        return ((role, path) for role, paths in self._paths.items() for path in paths)

    def skip(self, reason: str) -> None:
        """Counts an annotation that is left out."""
        self.skipped[reason] += 1


def per_file(
    read: Callable[[Path], Iterable[Record]], item: Callable[[Record, Annotations, str], Item | None]
) -> Callable[[Annotations], Iterator[tuple[str, Item]]]:
    """`Converter.items` of a data set with a file for each split, whose role is the split, and an item per record.

    Args:
        read: the records of a file.
        item: makes the item of a record. Its last argument is a unique name for it. None leaves it out.
    """

    def items(annotations: Annotations) -> Iterator[tuple[str, Item]]:
        counts: Counter[str] = Counter()
        for split, path in annotations.each():
            if split not in annotations.converter.splits:
                continue
            for record in read(path):
                counts[split] += 1
                found = item(record, annotations, f"{split}-{counts[split] - 1}")
                if found is not None:
                    yield split, found

    return items


def grouped(pairs: Iterable[tuple[str, str, tuple[str, ...]]]) -> dict[tuple[str, str], tuple[str, ...]]:
    """(split, medium) -> its captions, from (split, medium, captions)."""
    captions: dict[tuple[str, str], tuple[str, ...]] = {}
    for split, medium, texts in pairs:
        captions[split, medium] = captions.get((split, medium), ()) + texts
    return captions


def normalised_box(record: Record, corner: Any, size: tuple[float, float]) -> tuple[float, float, float, float]:
    """(center x, center y, width, height) in [0, 1], from (left, top, width, height) in pixels of an image.

    Parts outside of the image are cut off.
    """
    try:
        left, top, width, height = (float(number) for number in corner)
    except (TypeError, ValueError):
        raise record.error(f"the box must be [left, top, width, height], got {printable(repr(corner), 80)}") from None
    image_width, image_height = size
    x0, x1 = (min(max(x / image_width, 0.0), 1.0) for x in (left, left + width))
    y0, y1 = (min(max(y / image_height, 0.0), 1.0) for y in (top, top + height))
    if not (x0 < x1 and y0 < y1):
        place = f"{image_width:g}x{image_height:g}"
        raise record.error(f"the box {list(corner)} has no area in the image of {place} pixels")
    return (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0


def convert(
    converter: Converter,
    files: Iterable[PathLike],
    out: PathLike,
    *,
    media: PathLike | None = None,
    choice: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Writes `SPLIT.jsonl` for each split of a data set.

    Args:
        converter: one of `CONVERTERS`.
        files: annotation files under their official names, folders of them, or `ROLE=FILE` for a file of another name.
        out: the folder to write to.
        media: the folder of the videos or images. None takes `out`.
        choice: one of `converter.choices`. None takes the first.
        overwrite: whether files of an earlier conversion are replaced.

    Raises:
        DataError: a file is missing or malformed, or `out` has these files already.
    """
    out = Path(out)
    if choice is not None and choice not in converter.choices:
        choices = f"only {', '.join(converter.choices)}" if converter.choices else "only one way to split it"
        raise DataError(f"{converter.name} has no splits {choice!r}: there is {choices}")
    paths = _assigned(converter, files)
    finder = Media(None if media is None else Path(media), out)
    annotations = Annotations(converter, paths, finder, choice or next(iter(converter.choices), ""))
    items: dict[str, dict[str, Item]] = {}
    for split, item in converter.items(annotations):
        known = items.setdefault(split, {})
        try:
            item = Item.from_json(item.to_json())  # what is written can be read
        except DataError as error:
            raise DataError(f"{_names(paths)}: {split}, id {item.id!r}: {error}") from None
        if known.setdefault(item.id, item) != item:
            raise DataError(f"{_names(paths)}: {split} has two different items with the id {item.id!r}")
        if known[item.id] is not item:
            annotations.skip("repeated annotations")
    if not items:
        raise DataError(f"{_names(paths)}: no items of {converter.title}")
    targets = {split: out / f"{split}.jsonl" for split in items}
    if not overwrite and (existing := [path for path in targets.values() if path.exists()]):
        raise DataError(f"{existing[0]} exists: name another folder, or overwrite it")
    counts = {split: write_items(targets[split], items[split].values()) for split in items}
    return Conversion(targets, counts, dict(annotations.skipped), len(finder.named), list(finder.missing))


def skip_some(annotations: Annotations, read: Callable[..., Iterable[Record]]) -> Iterator[Record]:
    """The rows of a table. The few rows with a wrong number of columns are left out and counted.

    Raises:
        DataError: more than `MAX_SKIPPED_SHARE` of the rows are wrong.
    """
    wrong: list[DataError] = []
    count = 0
    for record in read(on_wrong_width=wrong.append):
        count += 1
        yield record
    if len(wrong) > MAX_SKIPPED_SHARE * (count + len(wrong)):
        raise wrong[0]
    for _ in wrong:
        annotations.skip("rows with a wrong number of columns")


def _assigned(converter: Converter, files: Iterable[PathLike]) -> dict[str, list[Path]]:
    """Role -> files, in the order of the converter's files."""
    found: dict[str, list[Path]] = {}
    roles = {file.role: file for file in converter.files}
    for given in [os.fspath(file) for file in files]:
        role, _, named = given.partition("=")
        if named and role in roles:
            found.setdefault(role, []).append(_existing(Path(named)))
            continue
        path = _existing(Path(given))
        inside = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
        matched = [(file.role, each) for each in inside for file in converter.files if file.matches(each)]
        if not matched:
            example = f"{converter.files[0].role}={given}"
            raise DataError(
                f"{given}: not a file of {converter.name}, which reads {_described(converter)}. "
                f"For a file of another name give its role, such as {example}"
            )
        for role, each in matched:
            found.setdefault(role, []).append(each)
    missing = [file.role for file in converter.files if file.required and file.role not in found]
    if missing or not found:
        raise DataError(f"{converter.name} needs {_described(converter, *missing)}")
    return {role: found[role] for role in roles if role in found}


def _existing(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    return path


def _described(converter: Converter, *roles: str) -> str:
    """Official names of files, and their roles."""
    files = [file for file in converter.files if not roles or file.role in roles]
    return ", ".join(f"{' or '.join(file.names)} ({file.role})" for file in files)


def _names(paths: Mapping[str, Sequence[Path]]) -> str:
    return ", ".join(str(path) for each in paths.values() for path in each)

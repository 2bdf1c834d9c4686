"""`mplug2-fast data`: convert, check and show data sets."""

from __future__ import annotations

import difflib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplug2_fast.cli.console import BAD_INPUT, emit, note, reporting, shown, waiting
from mplug2_fast.cli.options import WorkersOption
from mplug2_fast.cli.tables import columns, names_and_values
from mplug2_fast.errors import DataError

if TYPE_CHECKING:
    from mplug2_fast.datasets import Item
    from mplug2_fast.datasets.check import CheckResult, Finding, Split
    from mplug2_fast.datasets.converters import Converter

EXAMPLES = 3
"""Findings of each kind that are printed without `--all`."""
MAX_CELL = 60
"""Characters of a text in a table."""
SECONDS_BETWEEN_NOTES = 30.0

data = typer.Typer(help="Convert, check and show data sets.", no_args_is_help=True, rich_markup_mode=None)
DataPath = Annotated[Path, typer.Argument(metavar="DATA", help="A .jsonl file, or a folder with one for each split.")]
SplitOption = Annotated[str | None, typer.Option(metavar="SPLIT", help="Only this split.  [default: all]")]


@data.command("list")
def list_converters(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Describe this data set in full.")] = None,
) -> None:
    """List the data sets that `data convert` knows, and the files that it reads of each.

    Files in brackets may be left out, such as those of a split that is not needed.
    """
    with reporting():
        if name is not None:
            emit(names_and_values(_facts(_converter(name))))
            return
        from mplug2_fast.datasets.converters import CONVERTERS

        rows = [
            (converter.name, converter.title, ", ".join(_file_names(converter))) for converter in CONVERTERS.values()
        ]
        emit(columns(("name", "data set", "files"), rows))


@data.command()
def convert(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A data set: see `data list`.")],
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Its annotation files or their folder; ROLE=FILE, such as train=FILE, if a file has another name.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder for train.jsonl and the other splits.")],
    media: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder of the videos or images.  [default: that of --out]")
    ] = None,
    splits: Annotated[
        str | None, typer.Option(metavar="NAME", help="How to split a data set that is split in several ways.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files of an earlier conversion.")] = False,
) -> None:
    """Convert official annotation files to one JSON Lines file for each split."""
    with reporting():
        from mplug2_fast.datasets.converters import convert as convert_files

        converter = _converter(name)
        with waiting(f"converting {shown(name)}"):
            found = convert_files(converter, files, out, media=media, choice=splits, overwrite=overwrite)
        for split, path in found.files.items():
            emit(f"{shown(str(path))}\t{_counted(found.counts[split], 'item')}")
        for reason, count in found.skipped.items():
            note(f"note: left out {count:,} {reason}")
        if found.missing:
            missing, example = f"{len(found.missing):,} of {found.media:,}", found.missing[0]
            note(f"note: {missing} media files are not in {media}, such as {example}")


@data.command()
def check(
    path: DataPath,
    split: SplitOption = None,
    fast: Annotated[bool, typer.Option("--fast", help="Open the media files without decoding them.")] = False,
    max_tokens: Annotated[int, typer.Option(min=3, help="Tokens of a text that the model reads.")] = 512,
    num_workers: WorkersOption = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="Time limit for each media file.")] = 60.0,
    every: Annotated[bool, typer.Option("--all", help="Print all findings, not just some of each kind.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look for what would spoil training or evaluation.

    Finds missing and unreadable files, bad lines, repeated ids and items, empty and over-long texts, boxes outside of
    the image, labels that are not in training, and what is in training and in another split. The exit status is 2 if
    there are errors; warnings do not count.
    """
    with reporting():
        from mplug2_fast.datasets.check import check as check_data

        with _progress() as progress:
            found = check_data(
                path,
                split,
                decode=not fast,
                max_tokens=max_tokens,
                num_workers=num_workers,
                timeout=timeout,
                progress=progress,
            )
        emit(json.dumps(found.to_dict(), ensure_ascii=False) if as_json else _described(found, every))
        errors = len(found.errors)
        if errors:
            note(f"error: {path}: {_counted(errors, 'error')}, {_counted(len(found.findings) - errors, 'warning')}")
            raise typer.Exit(BAD_INPUT)


@data.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A .jsonl file.")],
    count: Annotated[int, typer.Option(min=1, help="Items to show.")] = 10,
    item_id: Annotated[str | None, typer.Option("--id", metavar="ID", help="Show the item with this id.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per item.")] = False,
) -> None:
    """Show items of a JSON Lines file as a table."""
    with reporting():
        items = _chosen(path, count, item_id)
        if as_json:
            for item in items:
                emit(json.dumps(item.to_json(), ensure_ascii=False))
        else:
            emit(_table(items))


def _converter(name: str) -> Converter:
    from mplug2_fast.datasets.converters import CONVERTERS

    if name not in CONVERTERS:
        near = difflib.get_close_matches(name, CONVERTERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"unknown data set {name!r}: {hint}`mplug2-fast data list` shows all")
    return CONVERTERS[name]


def _file_names(converter: Converter) -> Iterator[str]:
    for file in converter.files:
        names = " or ".join(file.names)
        yield names if file.required else f"[{names}]"


def _facts(converter: Converter) -> Iterator[tuple[str, str, str]]:
    yield "data set", "", converter.title
    yield "fields", "", ", ".join(converter.fields)
    yield "writes", "", ", ".join(f"{split}.jsonl" for split in converter.splits)
    for file, names in zip(converter.files, _file_names(converter), strict=True):
        yield "file", file.role, names
    for choice, meaning in converter.choices.items():
        yield "--splits", choice, meaning
    yield "source", "", converter.source


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _described(found: CheckResult, every: bool) -> str:
    rows = [(name, *_summary(split)) for name, split in found.splits.items()]
    parts = [columns(("split", "items", "files", "captions", "questions", "labels"), rows)] if rows else []
    kinds: dict[str, list[Finding]] = {kind: [] for kind in found.counts}
    for finding in found.findings:
        kinds[finding.kind].append(finding)
    for kind, findings in kinds.items():
        level = "error" if findings[0].is_error else "warning"
        lines = [f"{level}: {kind}: {len(findings):,}"]
        examples = findings if every else findings[:EXAMPLES]
        lines += [f"  {shown(finding.place)}: {shown(finding.message)}" for finding in examples]
        if len(findings) > len(examples):
            lines.append(f"  ... and {len(findings) - len(examples):,} more: --all shows them")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *([] if kinds else ["no problems found"])])


def _summary(split: Split) -> tuple[str, ...]:
    questions = f"{split.questions:,}"
    if split.unseen_answers:
        questions += f" ({split.unseen_answers / split.questions:.1%} with an answer that is not in training)"
    labels = f"{len(split.labels):,}"
    if len(split.labels) > 1:
        (most, top), *_, (least, low) = split.labels.items()
        share = top / sum(split.labels.values())
        labels += f" (most: {most}, {share:.1%} of the items; least: {least}, {_counted(low, 'item')})"
    return f"{split.items:,}", f"{split.files:,}", f"{split.captions:,}", questions, labels


def _chosen(path: Path, count: int, item_id: str | None) -> list[Item]:
    from mplug2_fast.datasets.items import file_of, scan_items

    items = []
    for _, item in scan_items(file_of(path, None)):
        if isinstance(item, DataError):
            raise item
        if item_id is None or item.id == item_id:
            items.append(item)
        if len(items) == count:
            break
    if not items:
        raise DataError(f"{path}: no items" if item_id is None else f"{path}: no item has the id {item_id!r}")
    return items


def _table(items: list[Item]) -> str:
    names = [each.name for each in fields(items[0]) if any(getattr(item, each.name) not in _EMPTY for item in items)]
    return columns(names, [[_cell(getattr(item, name)) for name in names] for item in items])


_EMPTY: tuple[Any, ...] = (None, (), {})


def _cell(value: Any) -> str:
    if value in _EMPTY:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(weight)}" for name, weight in value.items())
    if isinstance(value, tuple):
        texts = [_cell(each) for each in value]
        if all(isinstance(each, float) for each in value):
            return " ".join(texts)
        return texts[0] + (f" (+{len(texts) - 1})" if len(texts) > 1 else "")
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 3]}..."


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A function of (files done, all files): it moves a bar on a terminal, and otherwise prints a line now and then."""
    if not sys.stderr.isatty():
        yield _Notes()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    text = (TextColumn("files,"), TimeRemainingColumn(), TextColumn("left"))
    with Progress(BarColumn(), MofNCompleteColumn(), *text, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Notes:
    """Progress as lines on standard error."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last >= SECONDS_BETWEEN_NOTES:
            self._last = time.monotonic()
            note(f"{done:,} of {total:,} files read")

"""`mplug2-fast convert` and `mplug2-fast inspect`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from mplug2_fast.cli.console import BAD_INPUT, emit, note, reporting, shown, waiting
from mplug2_fast.cli.options import Dtype, KeepOption
from mplug2_fast.cli.tables import columns, names_and_values

if TYPE_CHECKING:
    from mplug2_fast.checkpoint import Inspection
    from mplug2_fast.tasks import Task


TaskOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TASK",
        help="A task, such as captioning, or file.py:Name for your own; repeat it for several."
        "  [default: as the file says, or the task with the most modules]",
    ),
]


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="An official .pth, a .safetensors, or a directory.")],
    target: Annotated[
        str, typer.Argument(metavar="OUT", help="The directory to write; it must not exist or must be empty.")
    ],
    task: TaskOption = None,
    dtype: Annotated[Dtype, typer.Option(help="auto keeps the file's. int8, fp8: 8-bit weights.")] = Dtype.auto,
    keep: KeepOption = None,
) -> None:
    """Write a checkpoint as a directory.

    It holds config.json and model.safetensors, with only what the task needs. With int8 or fp8, the weights of linear
    layers are rounded to 8 bits.
    """
    with reporting():
        from mplug2_fast import checkpoint

        with waiting(f"converting {shown(source)}"):
            checkpoint.convert(source, target, task=_tasks(task), dtype=dtype.value, keep=keep or ())
        written = checkpoint.inspect(target, task=_tasks(task))
        tasks, size = ", ".join(written.tasks), _million(written.parameters)
        emit(f"{shown(target)}\t{tasks}, {size} parameters, {_dtypes(written)}")


def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A .pth, a .safetensors, or a directory.")],
    task: TaskOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Describe a checkpoint.

    Prints its tasks, sizes and dtype, and which entries are needed, missing, unexpected or unused. The exit status is 2
    if it cannot be loaded; standard error says why.
    """
    with reporting():
        from mplug2_fast import checkpoint

        with waiting(f"reading {shown(file)}"):
            found = checkpoint.inspect(file, task=_tasks(task))
        emit(json.dumps(found.to_dict()) if as_json else _described(found))
        if found.problem is not None:
            note(f"error: {found.problem}", lines=True)
            raise typer.Exit(BAD_INPUT)


def _tasks(names: list[str] | None) -> list[Task] | None:
    from mplug2_fast.tasks import load

    return None if not names else [load(name) for name in names]


def _described(found: Inspection) -> str:
    facts = names_and_values(_facts(found))
    rows = [
        (group.kind, group.name, str(group.keys), _million(group.parameters), group.example) for group in found.groups
    ]
    if not rows:
        return facts
    return f"{facts}\n\n{columns(('', 'part', 'entries', 'parameters', 'for example'), rows)}"


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "file", shown(found.path)
    yield "form", f"{found.container}, {found.file_bytes / 1e6:,.1f} MB"
    if found.entry is not None:
        yield "weights", f"its entry {found.entry!r}"
    if found.family is not None:
        yield "family", found.family if found.size is None else f"{found.family}, {found.size}"
    yield "task", ", ".join(found.tasks) or "unknown"
    if len(found.servable) > 1:
        yield "serves", ", ".join(found.servable)
    if found.servable and found.config is not None:
        from mplug2_fast.tasks import TASKS

        present = frozenset[str]().union(*(TASKS[name].modules for name in found.servable))
        absent = [part for part in ("contrast", "matching") if part not in present]
        if absent:
            yield "lacks", f"heads of retrieval: {' and '.join(absent)}"
    yield "dtype", _dtypes(found)
    if found.keep is not None:
        but = f", but not of {' '.join(found.keep)}" if found.keep else ""
        yield "8-bit", f"weights of linear layers{but}{' (e4m3)' if found.weights == 'fp8' else ''}"
    yield "entries", f"{found.entries:,}, {_million(found.parameters)} parameters"
    yield "needed", f"{_million(found.needed_parameters)} parameters"
    yield "vocabulary", "its own vocab.txt" if found.vocabulary else "bert-base-uncased"
    if found.others:
        yield "also holds", ", ".join(found.others)
    if found.config is not None:
        for part, values in dataclasses.asdict(found.config).items():
            yield part, ", ".join(f"{name} {value!r}" for name, value in values.items())
    if found.assumed:
        yield "assumed", ", ".join(f"{name} {value!r}" for name, value in found.assumed.items())


def _dtypes(found: Inspection) -> str:
    if len(found.dtypes) == 1:
        return next(iter(found.dtypes))
    return ", ".join(f"{name} ({count} entries)" for name, count in found.dtypes.items()) or "none"


def _million(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M" if parameters >= 100_000 else f"{parameters:,}"

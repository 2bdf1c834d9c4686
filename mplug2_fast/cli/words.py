"""`mplug2-fast caption` and `mplug2-fast answer`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplug2_fast.cli.console import BAD_INPUT, emit, note, reporting, shown, waiting
from mplug2_fast.cli.options import (
    BeamsOption,
    CheckpointOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    Files,
    JsonOption,
    MaxLengthOption,
    MinLengthOption,
    ReturnOption,
)
from mplug2_fast.errors import ConfigError

if TYPE_CHECKING:
    from mplug2_fast.tasks import Result


def caption(
    files: Files,
    checkpoint: CheckpointOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    num_beams: BeamsOption = None,
    num_return: ReturnOption = 1,
    min_length: MinLengthOption = None,
    max_length: MaxLengthOption = None,
    as_json: JsonOption = False,
) -> None:
    """Caption videos and images.

    Prints a line for each file, in their order: its name, a tab, and the caption. A file that cannot be read gets
    a line on standard error, and the exit status is 2 once the others are done.
    """
    with reporting():
        from mplug2_fast.tasks import Captioner

        captioner = _load(Captioner, checkpoint, dtype, device)
        results = captioner.caption(
            files, num_beams=num_beams, num_return=num_return, min_length=min_length, max_length=max_length
        )
        _print(results, files, as_json)


def answer(
    files: Files,
    question: Annotated[str, typer.Option(metavar="TEXT", help="The question, asked about each file.")],
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="An answer to choose from; give it once for each. Without any, the answer is free."
        ),
    ] = None,
    candidates: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A text file of answers to choose from, one a line.")
    ] = None,
    checkpoint: CheckpointOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    num_beams: BeamsOption = None,
    num_return: ReturnOption = 1,
    min_length: MinLengthOption = None,
    max_length: MaxLengthOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question about videos and images.

    Prints a line for each file, in their order: its name, a tab, and the answer. A file that cannot be read gets
    a line on standard error, and the exit status is 2 once the others are done.
    """
    with reporting():
        choices = [*(candidate or ()), *_lines(candidates)] if candidate or candidates else None
        from mplug2_fast.tasks import Answerer

        answerer = _load(Answerer, checkpoint, dtype, device)
        results = answerer.answer(
            files,
            question,
            choices,
            num_beams=num_beams,
            num_return=num_return,
            min_length=min_length,
            max_length=max_length,
        )
        if unknown := answerer.unknown_words(question):
            note(f"note: the model does not know these words of the question: {', '.join(unknown)}")
        _print(results, files, as_json, question=question)


def _load(task: Any, checkpoint: str | None, dtype: Dtype, device: str) -> Any:
    if checkpoint is None:
        note("note: this is the tiny model that ships, which knows moving shapes only; --checkpoint takes another")
    with waiting("loading the model"):
        return task.from_pretrained(checkpoint, dtype=dtype.value, device=device)


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path}: the candidates cannot be read: {reason}") from error


def _print(results: Iterator[Result], files: list[str], as_json: bool, **more: str) -> None:
    """Print each result as soon as it is there; exit with a status of 2 at the end if any has an error."""
    failed = False
    for number, file in enumerate(files, start=1):
        with waiting(f"{shown(file)} ({number} of {len(files)})"):
            result = next(results)
        if result.error is not None:
            failed = True
            note(f"error: {shown(result.path)}: {result.error}")
        if as_json:
            emit(_json(result, more))
        elif result.error is None:
            for alternative in result.alternatives:
                emit(f"{shown(result.path)}\t{alternative.text}")
    if failed:
        raise typer.Exit(BAD_INPUT)


def _json(result: Result, more: dict[str, str]) -> str:
    """The fields of a `Result`; numbers that JSON does not know become null."""
    fields = dataclasses.asdict(result)
    fields["alternatives"] = [{"text": text, "score": _number(score)} for text, score in result.alternatives]
    fields["score"] = _number(result.score)
    fields["seconds"] = {stage: round(seconds, 6) for stage, seconds in result.seconds.items()}
    return json.dumps({"path": fields.pop("path"), **more, **fields}, allow_nan=False)


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

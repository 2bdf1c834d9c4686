"""`mplug2-fast caption` and `predict`, and what the commands that print results share."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from mplug2_fast.cli.bulk import BulkOptions, run_bulk
from mplug2_fast.cli.console import BAD_INPUT, emit, note, reporting, shown, waiting
from mplug2_fast.cli.options import (
    VIDEOS_HELP,
    BatchMemoryOption,
    BeamsOption,
    CheckpointOption,
    DecoderOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    FramesOption,
    JsonOption,
    MaxLengthOption,
    MinLengthOption,
    OutOption,
    RetryOption,
    ReturnOption,
    StrideOption,
    TimeoutOption,
    Videos,
    WindowsOption,
    WorkersOption,
)
from mplug2_fast.errors import ConfigError

if TYPE_CHECKING:
    from mplug2_fast.bulk import Ranks, Sources, Work
    from mplug2_fast.predict import Predictor, Result

_Predictor = TypeVar("_Predictor", bound="Predictor")

MAX_UNKNOWN_WORDS = 20
"""Unknown words that a note lists."""

MAX_QUOTED_CHARACTERS = 100
"""Characters of a question that an error repeats."""

MAX_CANDIDATE_BYTES = 2**16


def caption(
    files: Videos,
    out: OutOption = None,
    checkpoint: CheckpointOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    num_beams: BeamsOption = None,
    num_return: ReturnOption = 1,
    min_length: MinLengthOption = None,
    max_length: MaxLengthOption = None,
    as_json: JsonOption = False,
    frames: FramesOption = None,
    windows: WindowsOption = None,
    stride: StrideOption = None,
    num_workers: WorkersOption = None,
    timeout: TimeoutOption = None,
    batch_memory: BatchMemoryOption = None,
    decoder: DecoderOption = None,
    retry_failed: RetryOption = False,
) -> None:
    """Caption videos and images.

    Prints one line per file, in order: its name, a tab, and the caption. Files that cannot be read are reported on
    standard error. The others are still captioned, and the exit status is 2.

    With --out the results go to a file, one JSON object per video, and PATH may also be a folder or a .txt list. Rerun
    the same command to resume an interrupted run.
    """
    with reporting():
        bulk_options = BulkOptions(frames, windows, stride, num_workers, timeout, batch_memory, decoder, retry_failed)
        from mplug2_fast.predict import Captioner

        searching = {
            "num_beams": num_beams,
            "num_return": num_return,
            "min_length": min_length,
            "max_length": max_length,
        }
        if out is None:
            dataclasses.replace(bulk_options, timeout=None).require_none()
            captioner = load(Captioner, checkpoint, dtype, device)
            print_results(captioner, captioner.caption(files, **searching, **in_a_process(timeout)), files, as_json)
            return
        from mplug2_fast import bulk

        def work(ranks: Ranks, sources: Sources) -> Work:
            captioner = load(Captioner, checkpoint, dtype, ranks.device(device), quietly=ranks.rank > 0)
            return bulk.Predict(captioner, bulk_options.frames_of(captioner), searching)

        run_bulk(work, lambda: bulk.find_videos(files), out, bulk_options, "captions")


def predict(
    files: Annotated[list[str] | None, typer.Argument(metavar="[PATH]...", help=VIDEOS_HELP)] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="A task, such as captioning, or file.py:Name for your own.  [default: as the checkpoint says]",
        ),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="The text for each file.")] = None,
    texts: Annotated[
        str | None,
        typer.Option(
            metavar="JSONL",
            help="With --out: JSON lines with path, question (the text) and, optionally, id.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of the task, such as num_beams=3; repeat it for several."),
    ] = None,
    out: OutOption = None,
    checkpoint: CheckpointOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    frames: FramesOption = None,
    windows: WindowsOption = None,
    stride: StrideOption = None,
    num_workers: WorkersOption = None,
    timeout: TimeoutOption = None,
    batch_memory: BatchMemoryOption = None,
    decoder: DecoderOption = None,
    retry_failed: RetryOption = False,
) -> None:
    """Run any task on videos and images.

    Prints one line per file, in order: its name, a tab, and the result. With --out the results go to a file, one JSON
    object per video or text. Rerun the same command to resume an interrupted run.
    """
    if bool(files) == (texts is not None):
        raise typer.BadParameter("give either files or --texts, which lists them")
    with reporting():
        bulk_options = BulkOptions(frames, windows, stride, num_workers, timeout, batch_memory, decoder, retry_failed)
        from mplug2_fast import tasks
        from mplug2_fast.predict import Predictor

        chosen = None if task is None else tasks.load(task)
        options = dict(map(task_option, option or ()))
        if out is None:
            dataclasses.replace(bulk_options, timeout=None).require_none()
            if texts is not None:
                raise ConfigError("--texts: only with --out, which names the output file")
            predictor = load(Predictor, checkpoint, dtype, device, task=chosen)
            results = predictor.predict(files, text, **options, **in_a_process(timeout))
            print_results(predictor, results, files, as_json, **({} if text is None else {"question": text}))
            return
        from mplug2_fast import bulk

        def find() -> Sources:
            if texts is not None:
                return bulk.read_questions(texts)
            found = bulk.find_videos(files)
            return found if text is None else bulk.ask_all(found, text)

        def work(ranks: Ranks, sources: Sources) -> Work:
            predictor = load(Predictor, checkpoint, dtype, ranks.device(device), task=chosen, quietly=ranks.rank > 0)
            if predictor.task.reads_text or text is not None or texts is not None:
                check_texts(predictor, sources, ranks)
            return bulk.Predict(predictor, bulk_options.frames_of(predictor), options)

        run_bulk(work, find, out, bulk_options, "results")


def task_option(given: str) -> tuple[str, Any]:
    """Parses `name=value`. The value is JSON if it can be parsed as JSON, otherwise text."""
    name, equals, value = given.partition("=")
    if not equals or not name:
        raise ConfigError(f"--option {given}: give it as NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def check_texts(predictor: Predictor, sources: Sources, ranks: Ranks) -> None:
    """Raises `ConfigError` for the first text that the model cannot read."""
    asked = dict.fromkeys(question.text for video in sources.videos for question in video.questions)
    for text in asked or (None,):
        try:
            predictor.check_text(text)
        except ConfigError as error:
            if text is None:
                raise
            raise ConfigError(f"{text[:MAX_QUOTED_CHARACTERS]!r}: {error}") from error
    if ranks.rank == 0:
        note_unknown_words(predictor, asked)


def in_a_process(timeout: float | None) -> dict[str, Any]:
    """Decoding in one worker process, which can be ended at any time and keeps the order of the files."""
    return {"num_workers": 1, "timeout": timeout or 60.0}


def load(
    kind: type[_Predictor], checkpoint: str | None, dtype: Dtype, device: str, *, quietly: bool = False, **more: Any
) -> _Predictor:
    """Loads a predictor from a checkpoint."""
    if checkpoint is None and not quietly:
        from mplug2_fast.predict.predictor import TINY_MPLUG, tiny_model

        shapes = tiny_model(more.get("task") or kind.default_task) == TINY_MPLUG
        known = "pictures of shapes" if shapes else "moving shapes"
        note(f"note: this is the included tiny model, which knows only {known}; use --checkpoint for another")
    with waiting("loading the model"):
        return kind(checkpoint, dtype=dtype.value, device=device, **more)


def note_unknown_words(predictor: Predictor, questions: Iterable[str], what: str = "question") -> None:
    """Prints the words that the model cannot tell apart. `what` says where they are."""
    unknown = list(dict.fromkeys(word for question in questions for word in predictor.unknown_words(question)))
    if unknown:
        more = f" and {len(unknown) - MAX_UNKNOWN_WORDS} more" if len(unknown) > MAX_UNKNOWN_WORDS else ""
        words = f"{', '.join(unknown[:MAX_UNKNOWN_WORDS])}{more}"
        note(f"note: the model does not know these words of the {what}: {words}")


def lines_of(path: Path | None, what: str = "candidates") -> list[str]:
    """The non-empty lines of a file of candidates or other texts."""
    if path is None:
        return []
    from mplug2_fast.bulk.lists import lines_of

    try:
        lines = lines_of(str(path), f"a file of {what}", max_bytes=MAX_CANDIDATE_BYTES)
        return [text for line in lines if (text := line.decode().strip())]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the {what} cannot be read: it is not UTF-8 text") from error


def print_results(
    predictor: Predictor,
    results: Iterator[Result],
    files: list[str],
    as_json: bool,
    done: Callable[[int, Result], None] | None = None,
    **more: str,
) -> None:
    """Prints each result as soon as it is available. Exits with status 2 at the end if any has an error.

    Args:
        done: called with the place of the file and its result, if that is no error.
        more: further fields of the JSON objects.
    """
    failed = False
    for number, file in enumerate(files, start=1):
        with waiting(f"{shown(file)} ({number} of {len(files)})"):
            result = next(results)
        if result.error is not None:
            failed = True
            note(f"error: {shown(result.path)}: {result.error}")
        elif done is not None:
            done(number - 1, result)
        if as_json:
            emit(_json(result, more, boxes=predictor.task.finds_boxes))
        elif result.box is not None:
            emit(f"{shown(result.path)}\t{' '.join(f'{side:.1f}' for side in result.box)}")
        elif result.error is None:
            for alternative in result.alternatives:
                emit(f"{shown(result.path)}\t{shown(alternative.text)}")
    if failed:
        raise typer.Exit(BAD_INPUT)


def _json(result: Result, more: dict[str, str], *, boxes: bool) -> str:
    """The fields of a `Result`, those of boxes only with `boxes`. Infinities and NaN become null."""
    fields = dataclasses.asdict(result)
    fields["alternatives"] = [{"text": text, "score": _number(score)} for text, score in result.alternatives]
    fields["score"] = _number(result.score)
    fields["seconds"] = {stage: round(seconds, 6) for stage, seconds in result.seconds.items()}
    size, _ = fields.pop("size"), fields.pop("box")
    if boxes:
        from mplug2_fast.predict.boxes import box_fields

        fields |= {"size": size, **box_fields(result.box, result.size)}
    return json.dumps({"path": fields.pop("path"), **more, **fields}, allow_nan=False)


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

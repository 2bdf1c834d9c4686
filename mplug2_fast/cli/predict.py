"""`mplug2-fast caption` and `predict`, and what the commands that print results share."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from mplug2_fast.cli.bulk import BulkOptions, run_bulk
from mplug2_fast.cli.console import BAD_INPUT, emit, note, shown, waiting
from mplug2_fast.cli.options import (
    TEXTS_HELP,
    JsonOption,
    ModelOptions,
    OptionalVideos,
    OutOption,
    SearchOptions,
    Videos,
)
from mplug2_fast.errors import ConfigError

if TYPE_CHECKING:
    from mplug2_fast.bulk import Ranks, Sources, Work
    from mplug2_fast.predict import Predictor, Result
    from mplug2_fast.tasks import Task

_Predictor = TypeVar("_Predictor", bound="Predictor")

MAX_UNKNOWN_WORDS = 20
"""Unknown words that a note lists."""

MAX_QUOTED_CHARACTERS = 100
"""Characters of a question that an error repeats."""

MAX_CANDIDATE_BYTES = 2**16


def caption(
    files: Videos,
    out: OutOption = None,
    as_json: JsonOption = False,
    *,
    model: ModelOptions,
    search: SearchOptions,
    bulk_options: BulkOptions,
) -> None:
    """Caption videos and images.

    Prints one line per file, in order: its name, a tab, and the caption. Files that cannot be read are reported on
    standard error. The others are still captioned, and the exit status is 2.

    With --out the results go to a file, one JSON object per video, and PATH may also be a folder or a .txt list. Rerun
    the same command to resume an interrupted run.
    """
    from mplug2_fast.predict import Captioner

    run_task(Captioner, model, Inputs(files), vars(search), out, as_json, bulk_options, "captions")


def predict(
    files: OptionalVideos = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="A task, such as captioning, or file.py:Name for your own.  [default: as the checkpoint says]",
        ),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="The text for each file.")] = None,
    texts: Annotated[str | None, typer.Option(metavar="PATH", help=TEXTS_HELP)] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of the task, such as num_beams=3; repeat it for several."),
    ] = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    *,
    model: ModelOptions,
    bulk_options: BulkOptions,
) -> None:
    """Run any task on videos and images, or on texts.

    Prints one line per file, in order: its name, a tab, and the result. With --out the results go to a file, one JSON
    object per video or text. Rerun the same command to resume an interrupted run.
    """
    from mplug2_fast.predict import Predictor

    chosen = task_of(task)
    options, inputs = dict(map(task_option, option or ())), Inputs(files, text, texts)
    run_task(Predictor, model, inputs, options, out, as_json, bulk_options, "results", task=chosen)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a command runs on: files, files with one text, files with texts from a list, or texts alone.

    `texts` is a file: JSON lines with path and question, or, if its name ends with .txt, one text per line. `noun` is
    what the command calls a text.
    """

    files: list[str] | None
    text: str | None = None
    texts: str | None = None
    noun: str = "text"

    def __post_init__(self) -> None:
        if bool(self.files) + (self.texts is not None) > 1 or not (self.files or self.texts or self.text):
            raise typer.BadParameter(f"give either files or --{self.noun}s, which lists them")
        if self.text is not None and self.texts is not None:
            raise typer.BadParameter(f"give either --{self.noun} or --{self.noun}s")

    @property
    def alone(self) -> bool:
        """Whether there are texts and no files."""
        listed = self.texts is not None and self.texts.lower().endswith(".txt")
        return listed or not (self.files or self.texts)

    def only_texts(self) -> list[str]:
        """The texts alone."""
        return [self.text] if self.text is not None else lines_of(Path(self.texts or ""), "texts")

    def sources(self) -> Sources:
        """What a bulk run runs on."""
        from mplug2_fast import bulk

        if self.alone:
            return bulk.texts_alone(self.only_texts())
        if self.texts is not None:
            return bulk.read_questions(self.texts)
        found = bulk.find_videos(self.files or ())
        return found if self.text is None else bulk.ask_all(found, self.text)

    def require_for(self, predictor: Predictor) -> None:
        """Raises `ConfigError` unless there are files exactly if the task takes files."""
        name = predictor.task.name
        if predictor.task.reads_files and self.alone:
            raise ConfigError(
                f"{name} needs a video or an image with each text: name files, or JSON lines with path and question"
            )
        if not predictor.task.reads_files and not self.alone:
            raise ConfigError(f"{name} takes texts alone: use --text, or --texts with a .txt file of one text per line")


def run_task(
    kind: type[_Predictor],
    model: ModelOptions,
    inputs: Inputs,
    options: Mapping[str, Any],
    out: str | None,
    as_json: bool,
    bulk_options: BulkOptions,
    unit: str,
    *,
    scores: bool = False,
    done: Callable[[_Predictor, int, Result], None] | None = None,
    **more: Any,
) -> None:
    """Runs a task and prints its results, or writes them to `out`.

    Args:
        options: of the predictor's command. unit: what the results are called.
        scores: whether scores are printed.
        done: called with the predictor, the place of a file, and its result, if that is no error.
        more: further arguments of the predictor.
    """
    if out is None:
        bulk_options.require_out()
        if inputs.texts is not None and not inputs.alone:
            raise ConfigError(f"--{inputs.noun}s: only with --out, which names the output file")
        loaded = load(kind, model, **more)
        inputs.require_for(loaded)
        predictor, chosen = loaded.with_options(**options)
        files = inputs.only_texts() if inputs.alone else inputs.files or []
        given = {}
        if inputs.alone:
            results = predictor.predict_texts(files, **chosen)
        else:
            results = predictor.predict(files, inputs.text, **chosen, **in_a_process(bulk_options.timeout))
            given = {} if inputs.text is None else {"question": inputs.text}
        if inputs.text is not None:
            note_unknown_words(predictor, [inputs.text], inputs.noun)
        finished = None if done is None else functools.partial(done, loaded)
        print_results(predictor, results, files, as_json, finished, scores=scores, **given)
        return
    from mplug2_fast import bulk

    def work(ranks: Ranks, sources: Sources) -> Work:
        loaded = load(kind, model, ranks, **more)
        inputs.require_for(loaded)
        if loaded.task.reads_text or inputs.text is not None or inputs.texts is not None:
            check_texts(loaded, sources, ranks)
        predictor, chosen = loaded.with_options(**options)
        return bulk.Predict(predictor, bulk_options.frames_of(predictor), chosen)

    run_bulk(work, inputs.sources, out, bulk_options, unit, "text" if inputs.alone else "video")


def task_of(name: str | None) -> Task | str | None:
    """The task that the package or a file has under this name. Other names, which a checkpoint may have, stay names."""
    from mplug2_fast import tasks

    if name is None or not (":" in name or name in tasks.TASKS | tasks.PRETRAINING):
        return name
    return tasks.load(name)


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


def load(kind: type[_Predictor], model: ModelOptions, ranks: Ranks | None = None, **more: Any) -> _Predictor:
    """Loads a predictor from a checkpoint, on the device of one of several programs if they share the work."""
    if model.checkpoint is None and (ranks is None or ranks.rank == 0):
        from mplug2_fast.predict.predictor import TINY_MPLUG, tiny_model

        shapes = tiny_model(more.get("task") or kind.default_task) == TINY_MPLUG
        known = "pictures of shapes" if shapes else "moving shapes"
        note(f"note: this is the included tiny model, which knows only {known}; use --checkpoint for another")
    with waiting("loading the model"):
        device = model.device if ranks is None else ranks.device(model.device)
        return kind(model.checkpoint, dtype=model.dtype.value, device=device, keep=model.keep or (), **more)


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
    *,
    scores: bool = False,
    **more: str,
) -> None:
    """Prints each result as soon as it is available. Exits with status 2 at the end if any has an error.

    Args:
        done: called with the place of the file and its result, if that is no error.
        scores: whether to print them too.
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
            emit(_json(result, more, predictor.task))
        elif result.box is not None:
            emit(f"{shown(result.path)}\t{' '.join(f'{side:.1f}' for side in result.box)}")
        elif result.error is None:
            for alternative in result.alternatives:
                score = f"\t{alternative.score:.4f}" if scores else ""
                emit(f"{shown(result.path)}\t{shown(alternative.text)}{score}")
    if failed:
        raise typer.Exit(BAD_INPUT)


def _json(result: Result, more: dict[str, str], task: Task) -> str:
    """The fields of a `Result`, those of boxes only for tasks that find them. Infinities and NaN become null."""
    fields = dataclasses.asdict(result)
    fields["alternatives"] = [{"text": text, "score": _number(score)} for text, score in result.alternatives]
    fields["score"] = _number(result.score)
    fields["seconds"] = {stage: round(seconds, 6) for stage, seconds in result.seconds.items()}
    size, _ = fields.pop("size"), fields.pop("box")
    if task.finds_boxes:
        from mplug2_fast.predict.boxes import box_fields

        fields |= {"size": size, **box_fields(result.box, result.size)}
    return json.dumps(
        {"path" if task.reads_files else "question": fields.pop("path"), **more, **fields}, allow_nan=False
    )


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

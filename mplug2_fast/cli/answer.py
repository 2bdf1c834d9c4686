"""`mplug2-fast answer` and `rank`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplug2_fast.cli.bulk import BulkOptions, run_bulk
from mplug2_fast.cli.console import reporting
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
    WindowsOption,
    WorkersOption,
)
from mplug2_fast.cli.predict import check_texts, in_a_process, lines_of, load, note_unknown_words, print_results
from mplug2_fast.errors import ConfigError

if TYPE_CHECKING:
    from mplug2_fast.bulk import Ranks, Sources, Work

OptionalFiles = Annotated[list[str] | None, typer.Argument(metavar="[PATH]...", help=VIDEOS_HELP)]
QuestionOption = Annotated[str | None, typer.Option(metavar="TEXT", help="The question about each file.")]
QuestionsOption = Annotated[
    str | None,
    typer.Option(
        metavar="JSONL",
        help="With --out: JSON lines with path, question and, optionally, id.",
    ),
]
CandidateOption = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="An answer to choose from; repeat it for each.")
]
CandidatesOption = Annotated[
    Path | None, typer.Option(metavar="PATH", help="A text file of answers to choose from, one per line.")
]


def answer(
    files: OptionalFiles = None,
    question: QuestionOption = None,
    questions: QuestionsOption = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="An answer to choose from; repeat it for each. Without candidates the answer is generated.",
        ),
    ] = None,
    candidates: CandidatesOption = None,
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
    """Answer a question about videos and images.

    Prints one line per file, in order: its name, a tab, and the answer. Files that cannot be read are reported on
    standard error. The others are still answered, and the exit status is 2.

    With --out the results go to a file, one JSON object per question, and PATH may also be a folder or a .txt list.
    Rerun the same command to resume an interrupted run.
    """
    _require_questions(files, question, questions)
    with reporting():
        bulk_options = BulkOptions(frames, windows, stride, num_workers, timeout, batch_memory, decoder, retry_failed)
        choices = [*(candidate or ()), *lines_of(candidates)] if candidate or candidates else None
        searching = {
            "num_beams": num_beams,
            "num_return": num_return,
            "min_length": min_length,
            "max_length": max_length,
        }
        _answer(files, question, questions, choices, searching, (checkpoint, dtype, device), as_json, out, bulk_options)


def rank(
    files: OptionalFiles = None,
    question: QuestionOption = None,
    questions: QuestionsOption = None,
    candidate: CandidateOption = None,
    candidates: CandidatesOption = None,
    out: OutOption = None,
    checkpoint: CheckpointOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    num_return: ReturnOption = 1,
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
    """Choose the best of given answers to a question about videos and images.

    The same as `answer` with candidates. Prints one line per file, in order: its name, a tab, and the answer. Files
    that cannot be read are reported on standard error. The others are still answered, and the exit status is 2.

    With --out the results go to a file, one JSON object per question, and PATH may also be a folder or a .txt list.
    Rerun the same command to resume an interrupted run.
    """
    _require_questions(files, question, questions)
    if not candidate and candidates is None:
        raise typer.BadParameter("give the answers to choose from with --candidate or --candidates")
    with reporting():
        bulk_options = BulkOptions(frames, windows, stride, num_workers, timeout, batch_memory, decoder, retry_failed)
        choices = [*(candidate or ()), *lines_of(candidates)]
        model, searching = (checkpoint, dtype, device), {"num_return": num_return}
        _answer(files, question, questions, choices, searching, model, as_json, out, bulk_options)


def _require_questions(files: list[str] | None, question: str | None, questions: str | None) -> None:
    if (question is None) == (questions is None):
        raise typer.BadParameter("give either --question or, with --out, --questions")
    if bool(files) == (questions is not None):
        raise typer.BadParameter("give files with --question, but not with --questions, which lists them")


def _answer(
    files: list[str] | None,
    question: str | None,
    questions: str | None,
    choices: list[str] | None,
    searching: dict[str, Any],
    model: tuple[str | None, Dtype, str],
    as_json: bool,
    out: str | None,
    bulk_options: BulkOptions,
) -> None:
    """Answers. `searching` are the options of the search, `model` its checkpoint, dtype and device."""
    from mplug2_fast.predict import Answerer

    if out is None:
        dataclasses.replace(bulk_options, timeout=None).require_none()
        if question is None or files is None:
            raise ConfigError("--questions: only with --out, which names the output file")
        answerer = load(Answerer, *model)
        results = answerer.answer(files, question, choices, **searching, **in_a_process(bulk_options.timeout))
        note_unknown_words(answerer, [question])
        print_results(answerer, results, files, as_json, question=question)
        return
    from mplug2_fast import bulk

    checkpoint, dtype, device = model

    def find() -> Sources:
        if questions is not None:
            return bulk.read_questions(questions)
        return bulk.ask_all(bulk.find_videos(files or ()), question or "")

    def work(ranks: Ranks, sources: Sources) -> Work[Any]:
        answerer = load(Answerer, checkpoint, dtype, ranks.device(device), quietly=ranks.rank > 0)
        check_texts(answerer, sources, ranks)
        predictor, options = answerer.with_options(choices, **searching)
        return bulk.Predict(predictor, bulk_options.frames_of(predictor), options)

    run_bulk(work, find, out, bulk_options, "answers")

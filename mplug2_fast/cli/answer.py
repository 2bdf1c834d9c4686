"""`mplug2-fast answer` and `rank`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mplug2_fast.cli.bulk import BulkOptions
from mplug2_fast.cli.options import JsonOption, ModelOptions, OptionalVideos, OutOption, ReturnOption, SearchOptions
from mplug2_fast.cli.predict import Inputs, lines_of, run_task

QuestionOption = Annotated[str | None, typer.Option(metavar="TEXT", help="The question about each file.")]
QuestionsOption = Annotated[
    str | None, typer.Option(metavar="JSONL", help="With --out: JSON lines with path, question and, optionally, id.")
]
CandidateOption = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="An answer to choose from; repeat it for each.")
]
CandidatesOption = Annotated[
    Path | None, typer.Option(metavar="PATH", help="A text file of answers to choose from, one per line.")
]


def answer(
    files: OptionalVideos = None,
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
    as_json: JsonOption = False,
    *,
    model: ModelOptions,
    search: SearchOptions,
    bulk_options: BulkOptions,
) -> None:
    """Answer a question about videos and images.

    Prints one line per file, in order: its name, a tab, and the answer. Files that cannot be read are reported on
    standard error. The others are still answered, and the exit status is 2.

    With --out the results go to a file, one JSON object per question, and PATH may also be a folder or a .txt list.
    Rerun the same command to resume an interrupted run.
    """
    choices = [*(candidate or ()), *lines_of(candidates)] if candidate or candidates else None
    _answer(files, question, questions, choices, vars(search), model, as_json, out, bulk_options)


def rank(
    files: OptionalVideos = None,
    question: QuestionOption = None,
    questions: QuestionsOption = None,
    candidate: CandidateOption = None,
    candidates: CandidatesOption = None,
    out: OutOption = None,
    num_return: ReturnOption = 1,
    as_json: JsonOption = False,
    *,
    model: ModelOptions,
    bulk_options: BulkOptions,
) -> None:
    """Choose the best of given answers to a question about videos and images.

    The same as `answer` with candidates. Prints one line per file, in order: its name, a tab, and the answer. Files
    that cannot be read are reported on standard error. The others are still answered, and the exit status is 2.

    With --out the results go to a file, one JSON object per question, and PATH may also be a folder or a .txt list.
    Rerun the same command to resume an interrupted run.
    """
    if not candidate and candidates is None:
        raise typer.BadParameter("give the answers to choose from with --candidate or --candidates")
    choices = [*(candidate or ()), *lines_of(candidates)]
    _answer(files, question, questions, choices, {"num_return": num_return}, model, as_json, out, bulk_options)


def _answer(
    files: list[str] | None,
    question: str | None,
    questions: str | None,
    choices: list[str] | None,
    options: dict[str, Any],
    model: ModelOptions,
    as_json: bool,
    out: str | None,
    bulk_options: BulkOptions,
) -> None:
    if (question is None) == (questions is None):
        raise typer.BadParameter("give either --question or, with --out, --questions")
    inputs = Inputs(files, question, questions, "question")
    if not files and questions is None:
        raise typer.BadParameter("give the files that the question is about")
    from mplug2_fast.predict import Answerer

    options = {"candidates": choices, **options}
    run_task(Answerer, model, inputs, options, out, as_json, bulk_options, "answers")

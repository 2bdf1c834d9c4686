"""`mplug2-fast evaluate` and `compare`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mplug2_fast.cli.bulk import BulkOptions, progress
from mplug2_fast.cli.console import BAD_INPUT, emit, note, reporting, shown
from mplug2_fast.cli.options import ModelOptions
from mplug2_fast.cli.predict import lines_of, load, task_of, task_option
from mplug2_fast.cli.tables import columns

if TYPE_CHECKING:
    from mplug2_fast.evaluation import Comparison, Report


def evaluate(
    data: Annotated[Path, typer.Option(metavar="PATH", help="A JSONL file of items, or a folder with one per split.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the report. Rerun the same command to resume.")],
    task: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="A task, or file.py:Name for your own.  [default: as the checkpoint says]"),
    ] = None,
    split: Annotated[str | None, typer.Option(metavar="NAME", help="Evaluate only the items of this split.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A metric; repeat it for several.  [default: those of the task]"),
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(metavar="[python|java]", help="Tokenizer of captions: PTB rules, in Python or in Java.")
    ] = "python",
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of the task, such as num_beams=3; repeat it for several."),
    ] = None,
    candidates: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A text file of answers to choose from, one per line.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json.")] = False,
    *,
    model: ModelOptions,
    bulk_options: BulkOptions,
) -> None:
    """Evaluate a model on annotated videos and images.

    Prints one line per metric: its name, a tab, and the value. The report folder gets report.html and report.json, with
    everything that decides the numbers, and one JSON line per item. Failed items count as wrong, and the exit status
    is 2.
    """
    from mplug2_fast import bulk, evaluation
    from mplug2_fast.datasets import read_items
    from mplug2_fast.predict import Predictor
    from mplug2_fast.predict.predictor import tiny_model
    from mplug2_fast.tasks import Task

    items = read_items(data, split)
    chosen = task_of(task)
    options = dict(map(task_option, option or ()))
    if candidates is not None:
        options["candidates"] = lines_of(candidates)
    with bulk.Ranks() as ranks:
        first = ranks.rank == 0
        if isinstance(chosen, Task):  # before the model is loaded
            evaluation.check(chosen, items, metric, tokenizer)
        predictor = load(Predictor, model, ranks, task=chosen)
        videos = len(evaluation.sources_of(predictor.task, items, predictor.model.config))
        with progress(ranks) as started:
            report = evaluation.evaluate(
                predictor,
                items,
                out,
                metrics=metric,
                tokenizer=tokenizer,
                options=options,
                frames=bulk_options.frames_of(predictor),
                decoding=bulk_options.decoding(next(predictor.model.parameters()).device.type, videos, ranks),
                batch_memory=bulk_options.batch_bytes(),
                retry_failed=bulk_options.retry_failed,
                checkpoint=model.checkpoint or tiny_model(chosen),
                data=data,
                split=split,
                ranks=ranks,
                started=started,
            )
    if first:
        _print(report, out, as_json)
        if report.failed:
            raise typer.Exit(BAD_INPUT)


def compare(
    one: Annotated[Path, typer.Argument(metavar="A", help="A report folder, or its report.json.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Explain why two evaluations give different numbers: metrics side by side, settings and items that differ."""
    with reporting():
        from mplug2_fast.evaluation import Report
        from mplug2_fast.evaluation import compare as compared

        found = compared(Report.read(one), Report.read(other))
        if as_json:
            emit(json.dumps(found.to_json()))
        else:
            for part in _told(found, str(one), str(other)):
                emit(part)


def _print(report: Report, out: Path, as_json: bool) -> None:
    if as_json:
        emit((out / "report.json").read_text(encoding="utf-8").rstrip("\n"))
    else:
        for name, value in report.metrics.items():
            emit(f"{name}\t{value:.2f}")
    for name, reason in report.left_out.items():
        note(f"note: {name} not computed: {reason}")
    note(f"{shown(str(out))}: report.html and report.json; {len(report.items):,} items, {report.failed:,} failed")


def _told(found: Comparison, one: str, other: str) -> Iterator[str]:
    """The paragraphs of a comparison."""
    yield columns(["metric", one, other, "difference"], [_row(name, *both) for name, both in found.metrics.items()])
    if found.settings:
        rows = [[name, *map(_value, both)] for name, both in found.settings.items()]
        yield "\n" + columns(["setting that differs", one, other], rows)
    else:
        yield "\nAll settings are the same."
    only = " and ".join(
        f"{count:,} only in {name}" for name, count in zip((one, other), found.only, strict=True) if count
    )
    yield f"\n{found.shared:,} items in both{f', {only}' if only else ''}"
    if found.references_differ:
        yield f"references differ for {found.references_differ:,} of them"
    if found.shared_means is not None:
        before, after = found.shared_means
        yield f"mean {found.score} of the items in both: {before:.2f} and {after:.2f}"
    if found.changes:
        rows = [
            [change.id, *(f"{value:.2f}" for value in change.scores), *map(_value, change.predictions)]
            for change in found.changes
        ]
        yield f"{found.score} differs for {found.changed:,} of them; most for:\n"
        yield columns(["item", found.score or "", "", "prediction", ""], rows)


def _row(name: str, one: float | None, other: float | None) -> list[str]:
    difference = None if one is None or other is None else other - one
    return [name, _value(one), _value(other), "" if difference is None else f"{difference:+.2f}"]


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return "-" if value is None else str(value)

"""Evaluation of a model on items: predictions, metrics, and a report."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mplug2_fast
from mplug2_fast import bulk
from mplug2_fast.bulk.journal import Line, read_lines, write_whole
from mplug2_fast.checkpoint.hub import local
from mplug2_fast.checkpoint.source import WEIGHTS_NAME
from mplug2_fast.datasets import Item
from mplug2_fast.errors import ConfigError, DataError, printable
from mplug2_fast.evaluation.gallery import Evaluated, evaluate_gallery, files_of, path_of
from mplug2_fast.evaluation.metrics.base import Metric, load
from mplug2_fast.evaluation.metrics.tokenizer import TOKENIZERS, tokenize
from mplug2_fast.evaluation.page import render
from mplug2_fast.evaluation.report import PAGE_NAME, PREDICTIONS_NAME, ItemResult, Report
from mplug2_fast.evaluation.scoring import choose, score_all
from mplug2_fast.predict import Predictor
from mplug2_fast.tasks import Alternative, Task
from mplug2_fast.video import Preparation

PathLike = str | os.PathLike[str]
Started = Callable[[bulk.Plan], Callable[[int, int], None]]


def evaluate(
    predictor: Predictor,
    items: Sequence[Item],
    out: PathLike | None = None,
    *,
    metrics: Iterable[str] | None = None,
    tokenizer: str = "python",
    options: Mapping[str, Any] | None = None,
    frames: bulk.Frames | None = None,
    decoding: bulk.Decoding | None = None,
    batch_memory: int | None = None,
    retry_failed: bool = False,
    checkpoint: PathLike | None = None,
    data: PathLike | None = None,
    split: str | None = None,
    ranks: bulk.Ranks | None = None,
    started: Started | None = None,
) -> Report:
    """Predicts all items and scores the predictions. Several questions about one video are answered together.

    Args:
        predictor: the model and its task.
        items: each with a video or an image, and with the task's `fields`.
        out: a folder for the predictions and the report. An interrupted run resumes there.
        metrics: names in `METRICS`. None: all of the task's that can run here.
        tokenizer: of captions; a name in `TOKENIZERS`.
        options: of the task, such as num_beams.
        frames: of a clip; None for the model's number.
        decoding, batch_memory, retry_failed, ranks, started: see `bulk.run`.
        checkpoint, data, split: where model and items come from. The report names them, with hashes of the files.

    Raises:
        ConfigError: bad options, a metric that cannot run here, or `out` has other predictions.
        DataError: an item lacks what the task needs.
        MPlug2Error: the results cannot be written, or one clip alone is too large for the device.
    """
    ranks = ranks or bulk.Ranks({})
    task = predictor.task
    metrics = None if metrics is None else tuple(metrics)
    check(task, items, metrics, tokenizer)
    if out is not None:
        load("matplotlib.figure")
    frames = frames or bulk.Frames(task.num_frames(predictor.model.config))
    decoding = decoding or bulk.Decoding()
    options = dict(options or {})
    if task.evaluation == "gallery":
        _require_alone(task, ranks, frames, decoding, batch_memory, retry_failed)
    with ExitStack() as stack:
        folder = Path(out if out is not None else stack.enter_context(tempfile.TemporaryDirectory()))
        ranks.first_makes(lambda: _make(folder))
        if task.evaluation == "gallery":
            evaluated = partial(evaluate_gallery, predictor, items, options, frames, decoding, started)
        else:
            work = bulk.Predict(predictor, frames, options)
            config = predictor.model.config
            for text, item in {task.text_of(item, config): item for item in items}.items():
                _check_text(predictor, text, item)
            bulk.run(
                work,
                sources_of(task, items, config),
                folder / PREDICTIONS_NAME,
                decoding=decoding,
                batch_memory=batch_memory,
                retry_failed=retry_failed,
                ranks=ranks,
                started=started,
            )
            evaluated = partial(_scored, work, items, folder, metrics, tokenizer)

        def finish() -> Report:
            found = evaluated()
            failed = sum(result.error is not None for result in found.items)
            deciding = {
                "items": len(items),
                "failed": failed,
                **_origin(checkpoint, data, split),
                **found.settings,
                "preparation": predictor.preparation.name,
                "frame_sampling": predictor.preparation.sampling,
                "decoder": decoding.backend,
                "tokenizer": tokenizer if any(metric.tokenized for metric in _metrics(task, metrics)) else None,
                "device": next(predictor.model.parameters()).device.type,
                "mplug2_fast": mplug2_fast.__version__,
                "torch": torch.__version__,
            }
            scored = found.scored
            report = Report(task.name, scored.values, deciding, scored.libraries, scored.left_out, found.items)
            if out is not None:
                report.write(folder)
                write_whole(folder / PAGE_NAME, render(report).encode("utf-8", "backslashreplace"))
            return report

        return ranks.first_makes(finish)


def _require_alone(
    task: Task,
    ranks: bulk.Ranks,
    frames: bulk.Frames,
    decoding: bulk.Decoding,
    batch_memory: int | None,
    retry_failed: bool,
) -> None:
    """Raises `ConfigError` for options of bulk runs that a gallery does not have."""
    given = {
        "several programs": ranks.size > 1,
        "windows": frames.windows is not None,
        f"the decoder {decoding.backend}": decoding.backend != "pyav",
        "batch_memory": batch_memory is not None,
        "retry_failed": retry_failed,
    }
    refused = [name for name, there in given.items() if there]
    if refused:
        raise ConfigError(
            f"{task.name} ranks all files of a data set together, in one program that decodes with pyav: leave out "
            f"{', '.join(refused)}"
        )


def check(task: Task, items: Sequence[Item], metrics: Iterable[str] | None = None, tokenizer: str = "python") -> None:
    """Finds what would fail after hours of predictions.

    Raises:
        ConfigError: a metric or a tokenizer cannot run here.
        DataError: an item lacks what the task needs.
    """
    if tokenizer not in TOKENIZERS:
        raise ConfigError(f"no tokenizer {printable(repr(tokenizer))}: choose one of {', '.join(TOKENIZERS)}")
    for metric in _metrics(task, metrics):
        metric.require()
    if tokenizer == "java":
        tokenize(["a test"], tokenizer)
    if not items:
        raise DataError("there are no items to evaluate")
    for item in items:
        task.require_fields(item)
        if item.start is not None or item.end is not None:
            raise DataError(f"the item {printable(item.id)} is a part of a video (start, end): cut it out as a file")


def _metrics(task: Task, names: Iterable[str] | None) -> list[Metric]:
    """The metrics that are computed item by item."""
    if task.evaluation == "gallery":
        if names is not None:
            raise ConfigError(f"{task.name} has its own metrics, of recall in both directions: name no others")
        return []
    return choose(task, names)[0]


def sources_of(task: Task, items: Iterable[Item], config: Any) -> list[bulk.Source]:
    """The files of the items, each once, with all of its texts."""
    if not task.reads_files:
        return [bulk.Source("", (bulk.Question(task.text_of(item, config) or "", item.id),)) for item in items]
    asked: dict[tuple[str, ...], dict[bulk.Question, None]] = {}
    for item in items:
        texts = asked.setdefault(files_of(item), {})
        text = task.text_of(item, config)
        if text is not None:
            texts[bulk.Question(text, item.id)] = None
    return [bulk.Source.of(files, texts) for files, texts in asked.items()]


def _check_text(predictor: Predictor, text: str | None, item: Item) -> None:
    try:
        predictor.check_text(text)
    except ConfigError as error:
        raise DataError(f"the item {printable(item.id)}: {error}") from error


def _key(task: Task, item: Item, config: Any) -> Any:
    """The key of an item's line among the predictions."""
    text = task.text_of(item, config)
    path = path_of(item) if task.reads_files else ""
    return path if text is None else (path, text, item.id)


def _seen(item: Item, line: Line, preparation: Preparation) -> Item:
    """The item with its box in the model's coordinates, if these differ."""
    if item.box is None or line.get("size") is None:
        return item
    return replace(item, box=preparation.box_in_square(item.box, *line["size"]))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: the report cannot be written there: {error.strerror}") from error


def _scored(
    work: bulk.Predict, items: Sequence[Item], folder: Path, metrics: Iterable[str] | None, tokenizer: str
) -> Evaluated:
    """The metrics of the predictions of a run."""
    task, config, preparation = work.predictor.task, work.predictor.model.config, work.preparation
    by_key = {work.key(line): line for line in read_lines(folder / PREDICTIONS_NAME)}
    lines = [by_key[_key(task, item, config)] for item in items]
    items = [_seen(item, line, preparation) for item, line in zip(items, lines, strict=True)]
    predictions = [
        None
        if line["error"] is not None
        else [Alternative(each["text"], each["score"]) for each in line["alternatives"]]
        for line in lines
    ]
    scored = score_all(task, predictions, items, metrics=metrics, tokenizer=tokenizer)
    results = [
        ItemResult(
            id=item.id,
            path=path_of(item),
            question=task.text_of(item, config),
            prediction=line["text"],
            alternatives=tuple(each["text"] for each in line["alternatives"][1:]),
            references=task.references(item),
            scores={name: values[place] for name, values in scored.items.items()},
            frames=tuple(line["frames"]),
            error=line["error"],
        )
        for place, (item, line) in enumerate(zip(items, lines, strict=True))
    ]
    settings = {name: value for name, value in work.settings().items() if name not in ("command", "task", "windows")}
    return Evaluated(scored, results, settings)


def _origin(checkpoint: PathLike | None, data: PathLike | None, split: str | None) -> dict[str, Any]:
    """The sources of model and items."""
    found: dict[str, Any] = {"split": split}
    for name, path in (("data", data), ("checkpoint", checkpoint)):
        found[name] = None if path is None else os.fspath(path)
        file = None if path is None else _file(name, local(path) if name == "checkpoint" else Path(path), split)
        found[f"{name}_sha256"] = None if file is None else sha256_of(file)
    return found


def _file(name: str, path: Path, split: str | None) -> Path | None:
    """The path itself if it is a file. For a folder, the file with the weights or the split."""
    if path.is_dir():
        path = path / (WEIGHTS_NAME if name == "checkpoint" else f"{split}.jsonl")
    return path if path.is_file() else None


def sha256_of(path: Path) -> str:
    """The digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

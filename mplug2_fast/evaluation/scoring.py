"""Computes metrics of predictions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mplug2_fast.datasets import Item
from mplug2_fast.errors import ConfigError, DataError, NotFiniteError, printable
from mplug2_fast.evaluation.metrics import METRICS, Kind, Metric
from mplug2_fast.evaluation.metrics.base import Box
from mplug2_fast.evaluation.metrics.tokenizer import has_java, tokenize
from mplug2_fast.tasks import Alternative, Task, Texts, get

Prediction = str | Texts | Sequence[str] | float | Box | None
"""A text, several texts with the best first, a number or a box; None or an error if there is no result."""


@dataclass(frozen=True)
class Scored:
    """Values of metrics.

    Attributes:
        values: by name.
        items: the values of each item, by name, for metrics that have them.
        libraries: metric -> library and version.
        left_out: metric -> why it was not computed.
    """

    values: dict[str, float] = field(default_factory=dict)
    items: dict[str, list[float | None]] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def score(
    task: Task | str,
    predictions: Sequence[Prediction],
    items: Sequence[Item],
    *,
    metrics: Iterable[str] | None = None,
    tokenizer: str = "python",
) -> dict[str, float]:
    """The metrics of predictions that are in memory, by name. All are percentages, except `median_rank`.

    Args:
        task: has the references of an item, and the metrics.
        predictions: one for each item; None counts as wrong.
        items: with the references of the task.
        metrics: names in `METRICS`; None for the task's, without those that call Java.
        tokenizer: of captions; a name in `TOKENIZERS`.

    Raises:
        ConfigError: no such metric or tokenizer, or a library is missing.
        DataError: an item lacks references.
    """
    return score_all(task, predictions, items, metrics=metrics, tokenizer=tokenizer, java=False).values


def score_all(
    task: Task | str,
    predictions: Sequence[Prediction],
    items: Sequence[Item],
    *,
    metrics: Iterable[str] | None = None,
    tokenizer: str = "python",
    java: bool = True,
) -> Scored:
    """Like `score`, with the values of each item. Without `metrics`: the task's, with `java` also those in Java."""
    task = get(task)
    if len(predictions) != len(items):
        raise ConfigError(f"there are {len(predictions)} predictions for {len(items)} items")
    if not items:
        raise DataError("there are no items to score")
    chosen, left_out = choose(task, metrics, java)
    scored = Scored(left_out=left_out)
    given: dict[tuple[Kind, bool], _Given] = {}
    for metric in chosen:
        key = metric.kind, metric.tokenized
        if key not in given:
            given[key] = _given(task, metric, predictions, items, tokenizer)
        inputs = given[key]
        if metrics is None and (reason := _unfit(metric, inputs)):
            left_out[metric.name] = reason
            continue
        result = metric.compute(inputs.predictions, inputs.references)
        scored.values.update(result.values)
        scored.libraries[metric.name] = metric.described()
        for name, values in result.items.items():
            scored.items[name] = [None] * len(items)
            for place, value in zip(inputs.places, values, strict=True):
                scored.items[name][place] = value
    return scored


def choose(task: Task, metrics: Iterable[str] | None = None, java: bool = True) -> tuple[list[Metric], dict[str, str]]:
    """The metrics to compute, and why others of the task are left out.

    Raises `ConfigError` for a name that no metric has, and for a metric that is named and cannot run here.
    """
    if metrics is not None:
        chosen = []
        for name in dict.fromkeys(metrics):
            if name not in METRICS:
                raise ConfigError(f"no metric {printable(repr(name))}: choose from {', '.join(METRICS)}")
            if METRICS[name].java and not has_java():
                raise ConfigError(f"the metric {name} needs Java, and there is no command java: install it")
            chosen.append(METRICS[name])
        return chosen, {}
    if not task.metrics:
        raise ConfigError(f"{task.name} names no metrics: name some of {', '.join(METRICS)}")
    left_out = {}
    for metric in (METRICS[name] for name in task.metrics):
        if metric.opt_in is not None:
            left_out[metric.name] = f"{metric.opt_in}: name it to compute it"
        elif metric.java and not (java and has_java()):
            left_out[metric.name] = "it needs Java, and there is no command java" if java else "it needs Java"
    return [METRICS[name] for name in task.metrics if name not in left_out], left_out


@dataclass(frozen=True)
class _Given:
    """The arguments of metrics of one kind, and the numbers of the items."""

    predictions: list[Any]
    references: list[Any]
    places: list[int]


def _given(
    task: Task, metric: Metric, predictions: Sequence[Prediction], items: Sequence[Item], tokenizer: str
) -> _Given:
    found = [_PREDICTION[metric.kind](prediction) for prediction in predictions]
    right = [_reference(task, metric.kind, item) for item in items]
    places = list(range(len(items)))
    if metric.kind == "number":  # no number can stand for a missing one
        places = [place for place in places if found[place] is not None]
        if not places:
            raise DataError("the model has no result for any item")
        found, right = [found[place] for place in places], [right[place] for place in places]
    if metric.tokenized:
        found, right = _tokenized(found, right, tokenizer)
    return _Given(found, right, places)


def _tokenized(
    predictions: list[str], references: list[Mapping[str, float]], tokenizer: str
) -> tuple[list[str], list[dict[str, float]]]:
    texts = list(dict.fromkeys([*predictions, *(text for right in references for text in right)]))
    words = dict(zip(texts, tokenize(texts, tokenizer), strict=True))
    found: list[dict[str, float]] = []
    for right in references:
        found.append({})
        for text, weight in right.items():  # two captions may differ in punctuation alone
            found[-1][words[text]] = found[-1].get(words[text], 0.0) + weight
    return [words[text] for text in predictions], found


def _reference(task: Task, kind: Kind, item: Item) -> Any:
    if kind == "number":
        try:
            return float(item.label)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise DataError(f"the item {printable(item.id)} needs a label that is a number") from None
    if kind == "box":
        if item.box is None:
            raise DataError(f"the item {printable(item.id)} has no box")
        return item.box
    right = task.references(item)
    if not right:
        raise DataError(
            f"the item {printable(item.id)} has no {' or '.join(task.fields) or 'reference'} to compare with"
        )
    return right


def _texts(prediction: Prediction) -> list[str]:
    if prediction is None or isinstance(prediction, NotFiniteError):
        return []
    if isinstance(prediction, str | float | int):
        return [str(prediction)]
    return [each.text if isinstance(each, Alternative) else str(each) for each in prediction]


def _number(prediction: Prediction) -> float | None:
    texts = _texts(prediction)
    return _numbers(texts[0], 1)[0] if texts else None


def _box(prediction: Prediction) -> Box | None:
    if isinstance(prediction, tuple) and len(prediction) == 4:
        return prediction
    texts = _texts(prediction)
    if not texts:
        return None
    x, y, width, height = _numbers(texts[0], 4)
    return x, y, width, height


def _numbers(text: str, count: int) -> list[float]:
    """The numbers of a text, which are separated by spaces or commas."""
    try:
        numbers = [float(part) for part in re.split(r"[\s,]+", text.strip())]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise DataError(
            f"a prediction must be {count} number{'s' if count > 1 else ''}, got {printable(repr(text), 80)}"
        )
    return numbers


_PREDICTION: dict[Kind, Callable[[Prediction], Any]] = {
    "text": lambda prediction: (_texts(prediction) or [""])[0],
    "ranking": _texts,
    "number": _number,
    "box": _box,
}


def _unfit(metric: Metric, inputs: _Given) -> str | None:
    if metric.name == "vqa_accuracy" and all(len(right) == 1 for right in inputs.references):
        return "no item has answers of several annotators"
    return None

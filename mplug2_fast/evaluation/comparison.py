"""Explains why two evaluations give different numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mplug2_fast.evaluation.report import ItemResult, Report

MAX_CHANGES = 10


@dataclass(frozen=True)
class Change:
    """An item whose score differs."""

    id: str
    question: str | None
    scores: tuple[float, float]
    predictions: tuple[str | None, str | None]


@dataclass(frozen=True)
class Comparison:
    """Two reports side by side: the first, the second.

    Attributes:
        metrics: name -> both values; None where a report lacks one.
        settings: those that differ.
        shared, only: items in both, and in one alone.
        references_differ: shared items whose references differ.
        score: the name of the score that items are compared by, or None.
        shared_means: its means over the shared items.
        changed: the number of shared items with another score.
        changes: those that changed most.
    """

    metrics: dict[str, tuple[float | None, float | None]]
    settings: dict[str, tuple[Any, Any]]
    shared: int
    only: tuple[int, int]
    references_differ: int
    score: str | None
    shared_means: tuple[float, float] | None
    changed: int
    changes: list[Change]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(one: Report, other: Report) -> Comparison:
    """Compares two reports of the same task, or of two."""
    items = {item.id: item for item in one.items}
    pairs = [(items[item.id], item) for item in other.items if item.id in items]
    score = one.main_score if one.main_score == other.main_score else None
    rated: list[tuple[Change, float]] = []
    for first, second in pairs:
        a, b = first.scores.get(score or ""), second.scores.get(score or "")
        if a is not None and b is not None:
            said = first.prediction, second.prediction
            rated.append((Change(first.id, first.question, (a, b), said), abs(b - a)))
    rated.sort(key=lambda each: -each[1])
    means = [sum(change.scores[side] for change, _ in rated) / len(rated) for side in (0, 1)] if rated else None
    return Comparison(
        metrics=_both(one.metrics, other.metrics),
        settings={
            name: values for name, values in _both(_deciding(one), _deciding(other)).items() if values[0] != values[1]
        },
        shared=len(pairs),
        only=(len(one.items) - len(pairs), len(other.items) - len(pairs)),
        references_differ=sum(_right(first) != _right(second) for first, second in pairs),
        score=score,
        shared_means=None if means is None else (means[0], means[1]),
        changed=sum(difference > 0 for _, difference in rated),
        changes=[change for change, difference in rated[:MAX_CHANGES] if difference > 0],
    )


def _deciding(report: Report) -> dict[str, Any]:
    libraries = {f"{name} by": library for name, library in report.libraries.items()}
    return {"task": report.task, **report.settings, **libraries}


def _both(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (one.get(name), other.get(name)) for name in {**one, **other}}


def _right(item: ItemResult) -> dict[str, float]:
    return {text: round(weight, 6) for text, weight in item.references.items()}

"""The page of a report: one HTML file that needs no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mplug2_fast.evaluation.pictures import found_at_rank, frames_of, histogram
from mplug2_fast.evaluation.report import ItemResult, Report

EXAMPLES = 8
"""Number of the worst and of the best items."""
MAX_FAILED = 20
MAX_ANSWERS = 12
"""Rows and columns of the confusion matrix."""
RANKS = ("rank", "text_rank", "visual_rank")
"""Scores of items that are ranks."""
OTHER, FAILED = "(other)", "(failed)"


@dataclass(frozen=True)
class Example:
    """An item and its frames."""

    item: ItemResult
    frames: list[str]


def render(report: Report) -> str:
    """The page."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["shown"] = shown
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    score = report.main_score
    worst, best = examples(report.items, score)
    return template.render(
        report=report,
        score=score,
        plots=plots(report),
        confusion=confusion(report.items) if "accuracy" in report.metrics else None,
        examples=[
            (title, [Example(item, frames_of(item.path or "", item.frames)) for item in items])
            for title, items in (("Worst", worst), ("Best", best))
        ],
        failed=[item for item in report.items if item.error is not None][:MAX_FAILED],
    )


def shown(value: Any) -> str:
    """A value for a reader."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def examples(items: Sequence[ItemResult], score: str | None) -> tuple[list[ItemResult], list[ItemResult]]:
    """The worst and the best items by a score, the most extreme first. No item is among both."""
    if score is None:
        return [], []
    rated = [item for item in items if item.error is None and item.scores.get(score) is not None]
    rated.sort(key=lambda item: item.scores[score] or 0.0)
    worst = rated[: min(EXAMPLES, (len(rated) + 1) // 2)]
    return worst, rated[: len(worst) - 1 : -1][:EXAMPLES]


def plots(report: Report) -> list[str]:
    """Histograms of the items' scores, and the recall of a retrieval."""
    names = {name: None for item in report.items for name in item.scores}
    columns = {name: [item.scores[name] for item in report.items] for name in names}
    ranks = {name: columns.pop(name) for name in RANKS if name in columns}
    drawn = [
        found_at_rank([rank or float("inf") for rank in found], name.removesuffix("rank"))
        for name, found in ranks.items()
    ]
    for name, values in columns.items():
        if there := [value for value in values if value is not None]:
            drawn.append(histogram(there, name))
    return drawn


@dataclass(frozen=True)
class Confusion:
    """Counts of answers.

    Attributes:
        predicted: the columns. rows: the right answer, its counts, and its share of each.
    """

    predicted: list[str]
    rows: list[tuple[str, list[tuple[int, float]]]]


def confusion(items: Sequence[ItemResult]) -> Confusion:
    """Counts of predicted answers for each of the most frequent right answers."""
    pairs = [(_right(item), FAILED if item.prediction is None else item.prediction) for item in items]
    frequent = [answer for answer, _ in Counter(right for right, _ in pairs).most_common(MAX_ANSWERS)]

    def name(answer: str) -> str:
        return answer if answer in frequent or answer == FAILED else OTHER

    counts = Counter((name(right), name(said)) for right, said in pairs)
    there = {said for _, said in counts}, {right for right, _ in counts}
    predicted, rights = ([each for each in [*frequent, OTHER, FAILED] if each in names] for names in there)
    rows = []
    for right in rights:
        total = sum(counts[right, said] for said in predicted)
        rows.append((right, [(counts[right, said], counts[right, said] / total) for said in predicted]))
    return Confusion(predicted, rows)


def _right(item: ItemResult) -> str:
    return max(item.references, key=lambda text: item.references[text])

"""Metrics of captions, by pycocoevalcap. Texts are tokenized before: see `tokenizer`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from mplug2_fast.errors import MPlug2Error
from mplug2_fast.evaluation.metrics.base import References, Scores, load, percent

LIBRARY = "pycocoevalcap"


def bleu(predictions: Sequence[str], references: Sequence[References]) -> Scores:
    """BLEU-1 to BLEU-4 over all items; for each item, its own BLEU-4."""
    values, items = (
        load("pycocoevalcap.bleu.bleu").Bleu(4).compute_score(*_numbered(references, predictions), verbose=0)
    )
    return Scores({f"bleu_{n}": 100 * float(value) for n, value in enumerate(values, 1)}, {"bleu_4": percent(items[3])})


def rouge_l(predictions: Sequence[str], references: Sequence[References]) -> Scores:
    """ROUGE-L."""
    return _scored("rouge_l", load("pycocoevalcap.rouge.rouge").Rouge(), predictions, references)


def cider(predictions: Sequence[str], references: Sequence[References]) -> Scores:
    """CIDEr-D, which COCO calls CIDEr. Words are weighted by how rare they are in the references of these items."""
    return _scored("cider", load("pycocoevalcap.cider.cider").Cider(), predictions, references)


def meteor(predictions: Sequence[str], references: Sequence[References]) -> Scores:
    """METEOR 1.5, in Java."""
    with _java("METEOR"):
        return _scored("meteor", load("pycocoevalcap.meteor.meteor").Meteor(), predictions, references)


def spice(predictions: Sequence[str], references: Sequence[References]) -> Scores:
    """SPICE, in Java. Downloads models when it is first used."""
    with _java("SPICE"), contextlib.redirect_stdout(io.StringIO()):
        value, items = load("pycocoevalcap.spice.spice").Spice().compute_score(*_numbered(references, predictions))
    return Scores({"spice": 100 * float(value)}, {"spice": percent([item["All"]["f"] for item in items])})


def _scored(name: str, scorer: Any, predictions: Sequence[str], references: Sequence[References]) -> Scores:
    value, items = scorer.compute_score(*_numbered(references, predictions))
    return Scores({name: 100 * float(value)}, {name: percent(items)})


def _numbered(
    references: Sequence[References], predictions: Sequence[str]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Predictions and references in the scorers' form. A reference is repeated by its weight, at least once."""
    right = {
        number: [text for text, weight in weights.items() for _ in range(max(1, round(weight)))]
        for number, weights in enumerate(references)
    }
    return right, {number: [text] for number, text in enumerate(predictions)}


@contextlib.contextmanager
def _java(name: str) -> Any:
    try:
        yield
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MPlug2Error(f"{name} failed in Java ({reason}): leave it out, or repair Java") from error

"""Metrics of labels and numbers, by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mplug2_fast.evaluation.metrics.base import References, Scores, load

LIBRARY = "torchmetrics"


def f1(predictions: Sequence[str], references: Sequence[References]) -> Scores:
    """F1: of two classes, that of the last in alphabetical order (1, true, yes); otherwise the mean over classes."""
    functional = load("torchmetrics.functional.classification")
    found, right, classes = _ids(predictions, references)
    if len(classes) == 2:
        value = functional.binary_f1_score((found == 1).long(), right)
    else:
        value = functional.multiclass_f1_score(found, right, num_classes=len(classes) + 1, average="macro")
    return Scores({"f1": 100 * float(value)})


def matthews(predictions: Sequence[str], references: Sequence[References]) -> Scores:
    """Matthews' correlation coefficient."""
    found, right, classes = _ids(predictions, references)
    functional = load("torchmetrics.functional.classification")
    value = functional.multiclass_matthews_corrcoef(found, right, num_classes=len(classes) + 1)
    return Scores({"matthews": 100 * float(value)})


def pearson(predictions: Sequence[float], references: Sequence[float]) -> Scores:
    """Pearson's correlation coefficient."""
    return _correlation("pearson", "pearson_corrcoef", predictions, references)


def spearman(predictions: Sequence[float], references: Sequence[float]) -> Scores:
    """Spearman's rank correlation coefficient."""
    return _correlation("spearman", "spearman_corrcoef", predictions, references)


def _correlation(name: str, function: str, predictions: Sequence[float], references: Sequence[float]) -> Scores:
    compute = getattr(load("torchmetrics.functional.regression"), function)
    both = (torch.tensor(values, dtype=torch.float64) for values in (predictions, references))
    return Scores({name: 100 * float(compute(*both))})


def _ids(predictions: Sequence[str], references: Sequence[References]) -> tuple[Tensor, Tensor, list[str]]:
    """Predictions and references as numbers of classes, and the references' classes in order. Other predictions are one
    further class."""
    right = [max(weights, key=lambda text: weights[text]) for weights in references]
    classes = sorted(set(right))
    number = {label: place for place, label in enumerate(classes)}
    found = [number.get(text, len(classes)) for text in predictions]
    return torch.tensor(found), torch.tensor([number[label] for label in right]), classes

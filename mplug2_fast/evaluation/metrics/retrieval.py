"""Metrics of retrieval, by torchmetrics."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

from mplug2_fast.evaluation.metrics.base import References, Scores, load, percent
from mplug2_fast.evaluation.recall import CUTOFFS

LIBRARY = "torchmetrics"


def retrieval(predictions: Sequence[Sequence[str]], references: Sequence[References]) -> Scores:
    """R@1, R@5 and R@10, the mean reciprocal rank, and the median rank.

    A query counts as found at K if one of its right results is among the first K: with five captions of an image, one
    suffices. `rank` is that of the first right result. A query whose ranking has none has an infinite rank.
    """
    library = load("torchmetrics.retrieval")
    queries = [number for number, ranking in enumerate(predictions) for _ in ranking]
    scores = torch.tensor([1 / place for ranking in predictions for place in range(1, len(ranking) + 1)])
    hits = torch.tensor(
        [text in right for ranking, right in zip(predictions, references, strict=True) for text in ranking]
    )
    indexes = torch.tensor(queries)
    found = len(set(queries)) / len(predictions)  # a query without results is no query to the library

    def average(metric: object) -> float:
        return 100 * found * float(metric(scores, hits, indexes=indexes)) if queries else 0.0

    values = {f"recall@{k}": average(library.RetrievalHitRate(empty_target_action="neg", top_k=k)) for k in CUTOFFS}
    values["mrr"] = average(library.RetrievalMRR(empty_target_action="neg"))
    ranks = [_rank(ranking, right) for ranking, right in zip(predictions, references, strict=True)]
    values["median_rank"] = statistics.median(ranks)
    return Scores(values, {"reciprocal_rank": percent([1 / rank for rank in ranks]), "rank": ranks})


def _rank(ranking: Sequence[str], right: References) -> float:
    return next((place for place, text in enumerate(ranking, 1) if text in right), math.inf)

"""Recall of a matrix of scores."""

from __future__ import annotations

from torch import Tensor

CUTOFFS = (1, 5, 10)


def recalls(scores: Tensor, right: Tensor) -> dict[str, float]:
    """`recall@1`, `recall@5`, `recall@10` and their mean `recall_mean`, in percent, and `median_rank`, from 1.

    A query counts as found at K if one of its right results is among its K best.

    Args:
        scores: `(queries, results)`. right: the same shape, whether a result is right for a query.
    """
    best = scores.masked_fill(~right, -float("inf")).amax(dim=1, keepdim=True)
    ranks = (scores > best).sum(dim=1)
    found = {f"recall@{cutoff}": 100.0 * float((ranks < cutoff).double().mean()) for cutoff in CUTOFFS}
    mean = sum(found.values()) / len(CUTOFFS)
    return {**found, "recall_mean": mean, "median_rank": float(ranks.double().quantile(0.5)) + 1}

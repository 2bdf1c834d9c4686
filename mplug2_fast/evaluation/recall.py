"""Recall: the share of queries with a right result among the first K."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from mplug2_fast.tasks.matching import LEFT_OUT

CUTOFFS = (1, 5, 10)


def recalls(scores: Tensor, right: Tensor) -> dict[str, float]:
    """The recall of a matrix of scores: see `recalls_of_ranks`.

    Args:
        scores: `(queries, results)`. right: the same shape, whether a result is right for a query.
    """
    return recalls_of_ranks(ranks_of(scores, right))


def ranks_of(scores: Tensor, right: Tensor) -> list[int]:
    """The rank, from 1, of the best right result of each query. Arguments: as for `recalls`.

    Equal scores rank in the order of the results. Pairs that were not compared rank last, the right ones behind the
    wrong ones.
    """
    best = scores.masked_fill(~right, -float("inf")).amax(dim=1, keepdim=True)
    tied = scores == best
    first = (tied & right).int().argmax(dim=1, keepdim=True)
    before = torch.arange(scores.shape[1], device=scores.device) < first
    ahead = (scores > best) | (tied & ~right & (before | (best <= LEFT_OUT)))
    return (1 + ahead.sum(dim=1)).tolist()


def recalls_of_ranks(ranks: Sequence[float]) -> dict[str, float]:
    """`recall@1`, `recall@5`, `recall@10` and their mean `recall_mean`, in percent, and `median_rank`.

    Args:
        ranks: where the best right result of each query ranks, counted from 1. Infinite if it was not found.
    """
    found = {f"recall@{cutoff}": 100.0 * sum(rank <= cutoff for rank in ranks) / len(ranks) for cutoff in CUTOFFS}
    mean = sum(found.values()) / len(CUTOFFS)
    return {**found, "recall_mean": mean, "median_rank": float(statistics.median(ranks))}

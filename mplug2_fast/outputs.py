"""The result of generation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class GenerationOutput:
    """Hypotheses of a beam search, best first.

    Attributes:
        sequences: ids `(batch, num_return, length)`, int64, starting with [CLS], padded with -1.
        scores: `(batch, num_return)`, float32, the length-penalised log-probabilities; -inf if a video has fewer
            hypotheses than `num_return`.
    """

    sequences: Tensor
    scores: Tensor

"""What generation returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class GenerationOutput:
    """Hypotheses of a beam search, best first.

    Attributes:
        sequences: ids `(batch, num_return, length)`, int64, from [CLS] on, padded with -1.
        scores: `(batch, num_return)`, float32, the length-penalised log-probabilities; -inf where a video has fewer
            hypotheses than were asked for.
    """

    sequences: Tensor
    scores: Tensor

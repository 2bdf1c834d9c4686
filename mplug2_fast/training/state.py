"""The state of a run besides its tensors, and which steps it skips."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

_SPIKE_MEMORY, _SPIKE_AFTER, _SPIKE_MIN = 0.98, 50, 0.1
"""Decay of mean and variance, steps before spikes are skipped, and the smallest standard deviation, for tiny losses."""


@dataclass
class State:
    """The state of a run besides its tensors. Every save contains it.

    Attributes:
        step: steps done. skipped: steps without an update. skipped_in_row: those since the last update.
        mean, variance: of recent losses.
        bad: path -> reason, of unreadable files.
        best: the best validation score, at `best_step`. worse: validations since then.
        scores: (step, metric -> value) of each validation.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    mean: float = 0.0
    variance: float = 0.0
    bad: dict[str, str] = field(default_factory=dict)
    best: float | None = None
    best_step: int = 0
    worse: int = 0
    scores: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def reason_to_skip(self, loss: float, norm: float, max_spike: float) -> str | None:
        """Why a step with this loss and this norm of the gradients makes no update.

        None if it makes one. Its loss then counts as recent.

        Args:
            max_spike: highest loss, in standard deviations over the recent mean. 0: no limit.
        """
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"the loss is {loss:g} and the norm of the gradients {norm:g}"
        known = self.step - self.skipped > _SPIKE_AFTER
        highest = self.mean + max_spike * max(math.sqrt(max(self.variance, 0.0)), _SPIKE_MIN)
        if max_spike and known and loss > highest:
            return f"the loss {loss:.4g} is above {highest:.4g}, {max_spike:g} standard deviations over the recent mean"
        difference = loss - self.mean
        keep = _SPIKE_MEMORY if self.step > self.skipped else 0.0
        self.mean += (1 - keep) * difference
        self.variance = keep * (self.variance + (1 - keep) * difference**2)
        return None

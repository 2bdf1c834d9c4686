"""One step of beam search over all beams and words."""

from __future__ import annotations

import torch
from torch import Tensor


def length_penalty(step: int) -> float:
    """((5 + step + 1) / 6)^0.6, by which the log-probability of a hypothesis of step + 1 tokens is divided."""
    return ((5.0 + step + 1) / 6.0) ** 0.6


def beam_step(
    logits: Tensor, cumulative: Tensor, *, step: int, min_length: int, end_token_id: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best `beams` continuations among beams × vocabulary, best first.

    Args:
        logits: `(batch, beams, vocabulary)`. cumulative: log-probabilities of the beams, float32, `(batch, beams)`.
        step: from 0. min_length: `end_token_id` is impossible while step < min_length.

    Returns scores `(batch, beams)` float32, the new cumulative log-probabilities, the beam that each came from and its
    token, all `(batch, beams)`.
    """
    beams, vocabulary = logits.shape[1:]
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    if step < min_length:
        words = torch.arange(vocabulary, device=logits.device)
        log_probs = torch.where(words == end_token_id, -1e20, log_probs)
    penalty = length_penalty(step)
    # The best `beams` of each beam are enough: no other word of it can be among the best `beams` of all.
    best, words = log_probs.topk(min(beams, vocabulary), dim=-1)
    scores, picks = ((cumulative[:, :, None] + best) / penalty).flatten(1).topk(beams, dim=-1)
    return scores, scores * penalty, picks // best.shape[-1], words.flatten(1).gather(1, picks)

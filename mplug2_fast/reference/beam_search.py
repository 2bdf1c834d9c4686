"""The official beam search, which recomputes every prefix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Hypothesis = tuple[float, Tensor]


def beam_search(
    next_logits: Callable[[Tensor, Tensor], Tensor],
    batch: int,
    *,
    start_token_id: int,
    end_token_id: int,
    num_beams: int,
    min_length: int,
    max_length: int,
    device: torch.device,
) -> list[list[Hypothesis]]:
    """Beam search over whole prefixes. Finished videos are copied out of the batch.

    Args:
        next_logits: (prefixes `(alive·beams, length)`, which videos are alive `(alive,)`) to the logits
            `(alive·beams, vocabulary)` of the next token.

    Returns for each video its hypotheses (score, ids from [CLS] on), best first.
    """
    alive = torch.arange(batch, device=device)
    sequences = torch.full((batch * num_beams, 1), start_token_id, dtype=torch.long, device=device)
    cumulative = torch.tensor([0.0] + [-torch.inf] * (num_beams - 1), device=device).repeat(batch, 1)
    hypotheses: list[list[Hypothesis]] = [[] for _ in range(batch)]

    for step in range(max_length):
        log_probs = F.log_softmax(next_logits(sequences, alive).float(), dim=-1)
        vocabulary = log_probs.shape[-1]
        if step < min_length:
            log_probs[:, end_token_id] = -1e20
        length_penalty = ((5.0 + step + 1) / 6.0) ** 0.6
        scores = ((cumulative.view(-1, 1) + log_probs) / length_penalty).view(len(alive), num_beams * vocabulary)
        scores, picks = scores.topk(num_beams, dim=-1)
        cumulative = scores * length_penalty

        offsets = torch.arange(len(alive), device=device)[:, None] * num_beams
        origin = (picks // vocabulary + offsets).view(-1)
        tokens = picks % vocabulary
        sequences = torch.cat([sequences[origin], tokens.view(-1, 1)], dim=1)

        finished = tokens == end_token_id
        done = finished[:, 0] | (step + 1 == max_length)
        finished |= done[:, None]
        grouped = sequences.view(len(alive), num_beams, -1)
        for row, beam in finished.nonzero().tolist():
            hypotheses[alive[row]].append((scores[row, beam].item(), grouped[row, beam]))
        if done.any():
            going_on = ~done
            alive, cumulative = alive[going_on], cumulative[going_on]
            sequences = grouped[going_on].flatten(0, 1)
            if not len(alive):
                break
    return [sorted(found, key=lambda h: -h[0]) for found in hypotheses]

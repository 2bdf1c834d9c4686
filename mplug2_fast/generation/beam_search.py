"""Beam search on the device: fixed shapes, finished videos masked, beams reordered by index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mplug2_fast.nn.text_decoder import Memory, TextDecoder
from mplug2_fast.ops.beam_step import beam_step
from mplug2_fast.ops.beam_update import beam_update
from mplug2_fast.outputs import GenerationOutput

Hypotheses = tuple[Tensor, Tensor]
"""Sequences from the last token of the start on, `(batch, num_return, max_length + 1)`, padded with -1, and scores
`(batch, num_return)`, -inf for none."""


def beam_search(
    decoder: TextDecoder,
    memory: Memory,
    *,
    start: Sequence[int],
    end_token_id: int,
    num_beams: int,
    min_length: int,
    max_length: int,
    num_return: int,
) -> Iterator[tuple[Tensor, Hypotheses]]:
    """The official search: a beam that produced the end token is stored as a hypothesis and continues. When the best
    beam produced it, or at the last step, all beams of that video are stored and the video is done.

    Args:
        memory: of `(batch, ...)` videos.
        start: the first tokens of all sequences, at least one: [CLS], or a prompt.
        end_token_id: [SEP] of a BERT vocabulary.
        min_length, max_length: tokens after `start`, the end token included.

    Yields after each of up to max_length steps whether all videos are done, one bool on the device, and the hypotheses
    so far. Once all are done, further steps do not change them.
    """
    batch, device = memory.states.shape[0], memory.states.device
    before = len(start) - 1
    cache = decoder.new_cache(batch, num_beams, before + max_length, device)
    for position, token in enumerate(start[:-1]):
        decoder.step(torch.full((batch, num_beams), token, device=device), position, cache, memory)
    first_rows = torch.arange(batch, device=device)[:, None] * num_beams

    sequences = torch.full((batch, num_beams, max_length + 1), -1, dtype=torch.long, device=device)
    sequences[:, :, 0] = start[-1]
    cumulative = torch.full((batch, num_beams), -torch.inf, device=device)
    cumulative[:, 0] = 0.0  # all beams start alike: only the first may be extended
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    best_sequences = sequences.new_full((batch, num_return, max_length + 1), -1)
    best_scores = cumulative.new_full((batch, num_return), -torch.inf)

    for step in range(max_length):
        logits = decoder.step(sequences[:, :, step], before + step, cache, memory)
        scores, cumulative, origin, tokens = beam_step(
            logits, cumulative, step=step, min_length=min_length, end_token_id=end_token_id
        )
        last = step + 1 == max_length
        sequences, done, best_sequences, best_scores = beam_update(
            scores, origin, tokens, sequences, done, best_sequences, best_scores,
            step=step, last=last, end_token_id=end_token_id,
        )  # fmt: skip
        yield done.all(), (best_sequences, best_scores)
        if not last:
            cache.reorder((first_rows + origin).flatten(), before + step + 1)


def output(hypotheses: Hypotheses, start: Sequence[int]) -> GenerationOutput:
    """What was found, from the first token of `start` on and without columns that no hypothesis needs."""
    sequences, scores = hypotheses
    sequences = sequences.masked_fill(scores[:, :, None].isneginf(), -1)
    length = int((sequences != -1).any(dim=1).any(dim=0).sum())
    sequences = sequences[:, :, :length]
    if len(start) > 1:
        before = torch.tensor(start[:-1], device=sequences.device).expand(*sequences.shape[:2], -1)
        sequences = torch.cat([before.masked_fill(scores[:, :, None].isneginf(), -1), sequences], dim=2)
    return GenerationOutput(sequences, scores)

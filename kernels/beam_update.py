"""Updates the beams and the finished hypotheses after a step of beam search, with one program per video.

The data are a few kilobytes, so the time is that of one launch. PyTorch's operators need about fifteen launches.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mplug2_fast.kernels._launch import Kernel, power_of_2
from mplug2_fast.kernels._tuning import Config

_TAKEN = tl.constexpr(float("-inf"))


@triton.jit
def beam_update_video(
    scores, origin, tokens, sequences, done, best_sequences, best_scores,
    new_sequences, new_done, new_best_sequences, new_best_scores,
    beams, kept, length, step, end,
    LAST: tl.constexpr, CANDIDATES: tl.constexpr, BEAMS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Candidates are the `kept` best sequences so far, then the beams. Of equal scores the first one wins."""
    video = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, LENGTH)
    beam = tl.arange(0, BEAMS)
    there = (beam < beams)[:, None] & (place < length)[None, :]
    came_from = tl.load(origin + video * beams + beam, beam < beams, 0)
    word = tl.load(tokens + video * beams + beam, beam < beams, 0)
    rows = tl.load(sequences + (video * beams + came_from)[:, None] * length + place[None, :], there, 0)
    rows = tl.where(place[None, :] == step + 1, word[:, None], rows)
    tl.store(new_sequences + (video * beams + beam)[:, None] * length + place[None, :], rows, there)

    was_done = tl.load(done + video).to(tl.int32)
    now_done = tl.where(tl.load(tokens + video * beams) == end, 1, LAST)
    tl.store(new_done + video, was_done | now_done)

    candidate = tl.arange(0, CANDIDATES)
    own = candidate - kept
    is_beam = (own >= 0) & (own < beams)
    score = tl.load(best_scores + video * kept + candidate, candidate < kept, _TAKEN)
    stored = tl.where(tl.load(tokens + video * beams + own, is_beam, -1) == end, 1, now_done) * (1 - was_done)
    fresh = tl.load(scores + video * beams + own, is_beam, _TAKEN)
    score = tl.where(is_beam, tl.where(stored != 0, fresh, _TAKEN), score)
    left = candidate < kept + beams
    for rank in range(kept):
        highest = tl.max(tl.where(left, score, _TAKEN), axis=0)
        pick = tl.min(tl.where(left & (score == highest), candidate, CANDIDATES), axis=0)
        left = left & (candidate != pick)
        picked_beam = tl.maximum(pick - kept, 0)
        parent = tl.load(origin + video * beams + picked_beam)
        old = tl.load(best_sequences + (video * kept + tl.minimum(pick, kept - 1)) * length + place, place < length, 0)
        new = tl.load(sequences + (video * beams + parent) * length + place, place < length, 0)
        new = tl.where(place == step + 1, tl.load(tokens + video * beams + picked_beam), new)
        at = video * kept + rank
        tl.store(new_best_sequences + at * length + place, tl.where(pick < kept, old, new), place < length)
        tl.store(new_best_scores + at, highest)


_update = Kernel(beam_update_video, [Config(num_warps=2)], Config())


def beam_update(
    scores: Tensor,
    origin: Tensor,
    tokens: Tensor,
    sequences: Tensor,
    done: Tensor,
    best_sequences: Tensor,
    best_scores: Tensor,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    step: int,
    last: bool,
    end_token_id: int,
) -> None:
    """Writes the new sequences, done, best_sequences and best_scores to `results`.

    All tensors are contiguous. Both the old and the new `done` are uint8.
    """
    batch, beams, length = sequences.shape
    kept = best_scores.shape[1]
    _update(
        lambda meta: (batch,),
        scores, origin, tokens, sequences, done, best_sequences, best_scores, *results,
        beams, kept, length, step, end_token_id,
        LAST=int(last),
        CANDIDATES=power_of_2(kept + beams),
        BEAMS=power_of_2(beams),
        LENGTH=power_of_2(length),
    )  # fmt: skip

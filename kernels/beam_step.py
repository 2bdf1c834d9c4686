"""One step of beam search: log-softmax, penalties and the best continuations, in two launches without the host.

The vocabulary of every beam is cut into splits. A program reads its split once and stores the largest logit, the sum of
exponentials and its best tokens. A second kernel, with one program per video, combines the splits. Candidates are
compared as integers with the value in the high bits and the index in the low bits: the maximum gives both, and of equal
values the lowest index.

A step reads the logits once, 0.3 MB for 5 beams with BERT's vocabulary, so its time is that of two launches. Splits are
small enough for more programs than multiprocessors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mplug2_fast.kernels._launch import Kernel, cdiv, power_of_2
from mplug2_fast.kernels._tuning import Config

MAX_CANDIDATES = 1 << 13
"""Candidates of a video that a program can hold in registers."""

IMPOSSIBLE = tl.constexpr(-1e20)
_NOTHING = tl.constexpr(-(2**63))


@triton.jit
def _packed(value, index):
    """An int64 in the order of the values; of equal values, the smaller index is larger. NaN counts as -inf."""
    value = tl.where(value == value, value, float("-inf"))
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _value(packed):
    bits = (packed >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _index(packed):
    return 0x7FFFFFFF - (packed & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def beam_step_split(
    logits, highest, total, candidates,
    beams, vocabulary, batch_stride, beam_stride, word_stride, blocked,
    SPLITS: tl.constexpr, PICKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One split of one beam: highest and total `(batch·beams, SPLITS)`, candidates `(batch·beams, SPLITS, PICKS)`.

    Args:
        blocked: an impossible token, or -1. It still counts in the sum.
    """
    row, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    word = split * BLOCK + tl.arange(0, BLOCK)
    there = word < vocabulary
    address = (row // beams).to(tl.int64) * batch_stride + (row % beams).to(tl.int64) * beam_stride
    address += word.to(tl.int64) * word_stride
    value = tl.load(logits + address, there, float("-inf")).to(tl.float32)
    top = tl.max(value, axis=0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    tl.store(highest + tl.program_id(0), top)
    tl.store(total + tl.program_id(0), tl.sum(tl.exp(value - shift), axis=0))
    left = tl.where(there, _packed(tl.where(word == blocked, IMPOSSIBLE, value), word), _NOTHING)
    picked = candidates + tl.program_id(0).to(tl.int64) * PICKS
    for pick in range(PICKS):
        best = tl.max(left, axis=0)
        tl.store(picked + pick, best)
        left = tl.where(left == best, _NOTHING, left)


@triton.jit
def beam_step_merge(
    highest, total, candidates, cumulative, scores, totals, origin, tokens,
    beams, vocabulary, cumulative_batch, cumulative_beam, blocked, penalty,
    SPLITS: tl.constexpr, PICKS: tl.constexpr, BEAMS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
    BLOCK_PICKS: tl.constexpr,
):  # fmt: skip
    """Combines the splits of one video into the results `(batch, beams)`."""
    video = tl.program_id(0)
    beam = tl.arange(0, BEAMS)[:, None]
    row = video.to(tl.int64) * beams + beam
    split = tl.arange(0, BLOCK_SPLITS)[None, :]
    there = (beam < beams) & (split < SPLITS)
    tops = tl.load(highest + row * SPLITS + split, there, float("-inf"))
    sums = tl.load(total + row * SPLITS + split, there, 0.0)
    top = tl.max(tops, axis=1, keep_dims=True)
    # A split without a finite logit adds its sum unchanged: zero or NaN.
    sums *= tl.where(tops == float("-inf"), 1.0, tl.exp(tops - top))
    log_total = tl.log(tl.sum(sums, axis=1, keep_dims=True))

    pick = tl.arange(0, BLOCK_PICKS)[None, :]
    there = (beam < beams) & (pick < SPLITS * PICKS)
    packed = tl.load(candidates + row * (SPLITS * PICKS) + pick, there, _NOTHING)
    there = packed != _NOTHING
    word = _index(packed)
    log_probability = tl.where(word == blocked, IMPOSSIBLE, _value(packed) - top - log_total)
    before = tl.load(cumulative + video.to(tl.int64) * cumulative_batch + beam * cumulative_beam, beam < beams, 0.0)
    score = tl.div_rn(before + log_probability, penalty + tl.zeros((BEAMS, BLOCK_PICKS), tl.float32))
    # A beam whose logits are not finite ranks first, so that the search ends with a score that is not finite.
    score = tl.where(score == score, score, float("inf"))
    left = tl.where(there, _packed(score, beam * vocabulary + word), _NOTHING)
    for place in range(beams):
        best = tl.max(tl.max(left, axis=1), axis=0)
        at = video.to(tl.int64) * beams + place
        tl.store(scores + at, _value(best))
        tl.store(totals + at, _value(best) * penalty)
        tl.store(origin + at, (_index(best) // vocabulary).to(tl.int64))
        tl.store(tokens + at, (_index(best) % vocabulary).to(tl.int64))
        left = tl.where(left == best, _NOTHING, left)


def _configs(values: int) -> list[Config]:
    """For programs that hold this many values, 8 to 32 per thread."""
    fitting = [warps for warps in (1, 2, 4, 8, 16) if 8 <= values // (32 * warps) <= 32] or [1 if values < 1024 else 16]
    return [Config(num_warps=warps) for warps in reversed(fitting)]


_split = Kernel(beam_step_split, lambda constants, _: _configs(constants["BLOCK"]), Config())
_merge = Kernel(beam_step_merge, lambda constants, _: _configs(constants["BEAMS"] * constants["BLOCK_PICKS"]), Config())


def beam_step(
    logits: Tensor,
    cumulative: Tensor,
    penalty: float,
    blocked: int,
    scores: Tensor,
    totals: Tensor,
    origin: Tensor,
    tokens: Tensor,
) -> None:
    """Writes the best `beams` continuations to the last four arguments, contiguous `(batch, beams)`.

    logits `(batch, beams, vocabulary)` and cumulative `(batch, beams)`, float32, may have any strides.

    Args:
        penalty: divides the log-probabilities. blocked: an impossible token, or -1.
    """
    batch, beams, vocabulary = logits.shape
    picks = min(beams, vocabulary)
    # As many splits as the limit on a video's candidates allows.
    block = power_of_2(cdiv(vocabulary, MAX_CANDIDATES // (power_of_2(beams) * picks)), 1024)
    splits = cdiv(vocabulary, block)
    highest, total = logits.new_empty((2, batch * beams, splits), dtype=torch.float32).unbind()
    candidates = logits.new_empty((batch * beams, splits, picks), dtype=torch.int64)
    constants = {"SPLITS": splits, "PICKS": picks}
    _split(
        lambda meta: (batch * beams * splits,),
        logits, highest, total, candidates, beams, vocabulary, *logits.stride(), blocked,
        key=(power_of_2(batch * beams),),
        BLOCK=block,
        **constants,
    )  # fmt: skip
    _merge(
        lambda meta: (batch,),
        highest, total, candidates, cumulative, scores, totals, origin, tokens,
        beams, vocabulary, *cumulative.stride(), blocked, penalty,
        key=(power_of_2(batch),),
        BEAMS=power_of_2(beams),
        BLOCK_SPLITS=power_of_2(splits),
        BLOCK_PICKS=power_of_2(splits * picks),
        **constants,
    )  # fmt: skip

"""One step of beam search over all beams and words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mplug2_fast.ops.runtime import cpu, triton
from mplug2_fast.ops.runtime.dispatch import Backend, Op
from mplug2_fast.ops.runtime.spec import Spec, normal
from mplug2_fast.ops.runtime.spec import upcast as in_float64

Step = tuple[Tensor, Tensor, Tensor, Tensor]

IMPOSSIBLE = -1e20
"""Log-probability of the end token before its time, as released."""

MAX_BEAMS, MAX_VOCABULARY = 32, 1 << 17
"""Of the Triton kernel."""


def length_penalty(step: int) -> float:
    """((5 + step + 1) / 6)^0.6, by which the log-probability of a hypothesis of step + 1 tokens is divided."""
    return ((5.0 + step + 1) / 6.0) ** 0.6


def reference(
    logits: Tensor, cumulative: Tensor, step: int, min_length: int, end_token_id: int, *, upcast: bool = False
) -> Step:
    """The best of all beams times all words."""
    logits, cumulative = in_float64(logits, cumulative) if upcast else (logits.float(), cumulative)
    log_probs = logits.log_softmax(dim=-1)
    if step < min_length:
        log_probs[..., end_token_id] = IMPOSSIBLE
    penalty = length_penalty(step)
    scores, picks = ((cumulative[..., None] + log_probs) / penalty).flatten(1).topk(logits.shape[1])
    return scores, scores * penalty, picks // logits.shape[2], picks % logits.shape[2]


def make(
    generator: torch.Generator,
    *,
    batch: int,
    beams: int,
    vocabulary: int,
    step: int = 0,
    min_length: int = 0,
    first: bool = False,
    strided: bool = False,
) -> dict[str, Any]:
    """`first`: all beams but the first are impossible, as at the start of a search."""
    logits = normal(generator, batch, beams, vocabulary + 3 * strided)[..., :vocabulary]
    # The best words of every beam differ in any dtype: which of two equal ones comes first is not specified.
    order = torch.rand(batch, beams, vocabulary, generator=generator).argsort(dim=-1)
    logits.copy_(torch.where(order < 2 * beams, 6 + 0.25 * order, logits))
    cumulative = -torch.rand(batch, beams, generator=generator, dtype=torch.float32)
    if first:
        cumulative[:, 1:] = -torch.inf
    return {"logits": logits, "cumulative": cumulative, "step": step, "min_length": min_length, "end_token_id": 2}


def run_torch(logits: Tensor, cumulative: Tensor, step: int, min_length: int, end_token_id: int) -> Step:
    beams, vocabulary = logits.shape[1:]
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    if step < min_length:
        words = torch.arange(vocabulary, device=logits.device)
        log_probs = torch.where(words == end_token_id, IMPOSSIBLE, log_probs)
    penalty = length_penalty(step)
    # The best `beams` of each beam are enough: no other word of it can be among the best `beams` of all.
    best, words = log_probs.topk(min(beams, vocabulary), dim=-1)
    scores, picks = ((cumulative[:, :, None] + best) / penalty).flatten(1).topk(beams, dim=-1)
    return scores, scores * penalty, picks // best.shape[-1], words.flatten(1).gather(1, picks)


def run_native(logits: Tensor, cumulative: Tensor, step: int, min_length: int, end_token_id: int) -> Step:
    batch, beams, vocabulary = logits.shape
    scores, total, origin, tokens = fake(logits, cumulative)
    cumulative = cumulative.contiguous()
    cpu.module().beam_step(
        cpu.isa(),
        logits.dtype == torch.bfloat16,
        cpu.threads(logits.numel()),
        (batch, beams, vocabulary),
        logits.data_ptr(),
        logits.stride()[:2],
        cumulative.data_ptr(),
        length_penalty(step),
        end_token_id if step < min_length else -1,
        scores.data_ptr(),
        total.data_ptr(),
        origin.data_ptr(),
        tokens.data_ptr(),
    )
    return scores, total, origin, tokens


def run_triton(logits: Tensor, cumulative: Tensor, step: int, min_length: int, end_token_id: int) -> Step:
    results = fake(logits, cumulative)
    if logits.shape[0]:
        blocked = end_token_id if step < min_length else -1
        triton.kernels("beam_step").beam_step(logits, cumulative, length_penalty(step), blocked, *results)
    return results


def triton_reasons(logits: Tensor, *_: Any) -> list[str]:
    reasons = triton.reasons(logits)
    for name, size, most in zip(("beams", "words"), logits.shape[1:], (MAX_BEAMS, MAX_VOCABULARY), strict=True):
        if size > most:
            reasons.append(f"the Triton kernel holds candidates in registers, of up to {most} {name}, not {size}")
    return reasons


def fake(logits: Tensor, cumulative: Tensor, *_: Any) -> Step:
    scores = cumulative.new_empty(logits.shape[:2])
    origin = scores.new_empty(scores.shape, dtype=torch.long)
    return scores, torch.empty_like(scores), origin, torch.empty_like(origin)


def check(logits: Tensor, cumulative: Tensor, step: int, min_length: int, end_token_id: int) -> None:
    if logits.dim() != 3 or cumulative.shape != logits.shape[:2] or 0 in logits.shape[1:]:
        raise ValueError(
            "logits must be (batch, beams, vocabulary) and cumulative (batch, beams), got "
            f"{tuple(logits.shape)} and {tuple(cumulative.shape)}"
        )
    if cumulative.dtype != torch.float32:
        raise TypeError(f"cumulative must be float32, got {cumulative.dtype}")
    if not 0 <= end_token_id < logits.shape[2]:
        raise ValueError(f"end_token_id {end_token_id} is not a word of a vocabulary of {logits.shape[2]}")


SPEC = Spec(
    name="beam_step",
    axes={
        "logits": "(batch, beams, vocabulary)",
        "cumulative": "(batch, beams), float32",
        "result": "four of (batch, beams)",
    },
    reference=reference,
    make=make,
    awkward=(
        *(
            {"batch": 4, "beams": beams, "vocabulary": vocabulary, "step": step, "min_length": least}
            for beams, vocabulary in ((1, 11), (5, 300), (10, 10), (5, 3))
            for step, least in ((0, 0), (1, 4), (7, 4))
        ),
        {"batch": 2, "beams": 3, "vocabulary": 1021, "first": True},
        {"batch": 2, "beams": 2, "vocabulary": 2500, "step": 1, "min_length": 4},
        {"batch": 1, "beams": 32, "vocabulary": 1100},
        {"batch": 2, "beams": 3, "vocabulary": 40, "strided": True},
        {"batch": 0, "beams": 3, "vocabulary": 40},
    ),
    models={
        "base": {"batch": 1, "beams": 5, "vocabulary": 30522, "step": 5, "min_length": 4},
        "large": {"batch": 1, "beams": 5, "vocabulary": 30522, "step": 5, "min_length": 4},
    },
    flops=lambda logits, **_: 4 * logits.numel(),
    kept=("cumulative",),
)

OP = Op(
    SPEC,
    "(Tensor logits, Tensor cumulative, int step, int min_length, int end_token_id) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    [
        Backend(
            "cpu",
            run_native,
            lambda logits, *_: cpu.reasons(logits),
            devices=("cpu",),
        ),
        Backend("triton", run_triton, triton_reasons, devices=triton.DEVICES),
        Backend("torch", run_torch, differentiable=True),
    ],
    fake=fake,
    check=check,
)


@OP.public
def beam_step(logits: Tensor, cumulative: Tensor, *, step: int, min_length: int, end_token_id: int) -> Step:
    """The best `beams` continuations among beams × vocabulary, best first.

    A continuation's score is its log-probability over the length penalty of this step.

    Args:
        logits: `(batch, beams, vocabulary)`. cumulative: log-probabilities of the beams, float32, `(batch, beams)`.
        step: from 0. min_length: `end_token_id` is impossible while step < min_length.

    Returns scores `(batch, beams)` float32, the new cumulative log-probabilities, the beam that each came from and its
    token (int64), all `(batch, beams)`.

    Raises:
        ValueError: shapes that do not go together, or no such end token.
        TypeError: cumulative is not float32.
    """
    return logits, cumulative, step, min_length, end_token_id  # type: ignore[return-value]

"""One step of beam search over all beams and tokens."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from mplug2_fast.ops.runtime import cpu, triton
from mplug2_fast.ops.runtime.backend import Backend
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.spec import Spec, normal

Step = tuple[Tensor, Tensor, Tensor, Tensor]
"""Scores, cumulative log-probabilities, origins and tokens."""

IMPOSSIBLE = -1e20
"""Log-probability of the end token before `min_length`, as in the official code."""

MAX_BEAMS, MAX_VOCABULARY = 32, 1 << 17
"""Limits of the Triton kernel."""


class Arguments(NamedTuple):
    logits: Annotated[Tensor, "(batch, beams, vocabulary)"]
    cumulative: Annotated[Tensor, "(batch, beams), float32"]
    step: int
    min_length: int
    end_token_id: int

    @property
    def blocked_token(self) -> int:
        """The token that must not follow; -1 for none."""
        return self.end_token_id if self.step < self.min_length else -1


def length_penalty(step: int) -> float:
    """((5 + step + 1) / 6)^0.6, which divides the log-probability of a hypothesis of step + 1 tokens."""
    return ((5.0 + step + 1) / 6.0) ** 0.6


def make_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    beams: int,
    vocabulary: int,
    step: int = 0,
    min_length: int = 0,
    first: bool = False,
    strided: bool = False,
) -> Arguments:
    """With `first`, all beams but the first are impossible, as at the start of a search."""
    logits = normal(generator, batch, beams, vocabulary + 3 * strided)[..., :vocabulary]
    # The best tokens of each beam differ in any dtype, because the order of equal ones is not specified.
    order = torch.rand(batch, beams, vocabulary, generator=generator).argsort(dim=-1)
    logits.copy_(torch.where(order < 2 * beams, 6 + 0.25 * order, logits))
    cumulative = -torch.rand(batch, beams, generator=generator, dtype=torch.float32)
    if first:
        cumulative[:, 1:] = -torch.inf
    return Arguments(logits, cumulative, step, min_length, end_token_id=2)


def check(a: Arguments) -> None:
    if a.logits.dim() != 3 or a.cumulative.shape != a.logits.shape[:2] or 0 in a.logits.shape[1:]:
        raise ValueError(
            "logits must be (batch, beams, vocabulary) and cumulative (batch, beams), got "
            f"{tuple(a.logits.shape)} and {tuple(a.cumulative.shape)}"
        )
    if a.cumulative.dtype != torch.float32:
        raise TypeError(f"cumulative must be float32, got {a.cumulative.dtype}")
    if not 0 <= a.end_token_id < a.logits.shape[2]:
        raise ValueError(f"end_token_id must be from 0 to {a.logits.shape[2] - 1}, got {a.end_token_id}")


def reference(a: Arguments) -> Step:
    """The best among all beams and all tokens."""
    log_probs = a.logits.to(a.cumulative.dtype).log_softmax(dim=-1)
    if a.step < a.min_length:
        log_probs[..., a.end_token_id] = IMPOSSIBLE
    penalty, (_, beams, vocabulary) = length_penalty(a.step), a.logits.shape
    scores, picks = ((a.cumulative[..., None] + log_probs) / penalty).flatten(1).topk(beams)
    return scores, scores * penalty, picks // vocabulary, picks % vocabulary


def run_torch(a: Arguments) -> Step:
    beams, vocabulary = a.logits.shape[1:]
    log_probs = torch.log_softmax(a.logits, dim=-1, dtype=torch.float32)
    if a.step < a.min_length:
        tokens = torch.arange(vocabulary, device=a.logits.device)
        log_probs = torch.where(tokens == a.end_token_id, IMPOSSIBLE, log_probs)
    penalty = length_penalty(a.step)
    # The best `beams` tokens of each beam suffice: no other token can be among the best `beams` of all.
    best, tokens = log_probs.topk(min(beams, vocabulary), dim=-1)
    scores, picks = ((a.cumulative[:, :, None] + best) / penalty).flatten(1).topk(beams, dim=-1)
    return scores, scores * penalty, picks // best.shape[-1], tokens.flatten(1).gather(1, picks)


def run_cpu(a: Arguments) -> Step:
    logits, cumulative = a.logits, a.cumulative.contiguous()
    scores, total, origin, tokens = fake(a)
    cpu.module().beam_step(
        cpu.isa(),
        logits.dtype == torch.bfloat16,
        cpu.threads(logits.numel()),
        tuple(logits.shape),
        logits.data_ptr(),
        logits.stride()[:2],
        cumulative.data_ptr(),
        length_penalty(a.step),
        a.blocked_token,
        scores.data_ptr(),
        total.data_ptr(),
        origin.data_ptr(),
        tokens.data_ptr(),
    )
    return scores, total, origin, tokens


def run_triton(a: Arguments) -> Step:
    results = fake(a)
    if a.logits.shape[0]:
        triton.kernels("beam_step").beam_step(a.logits, a.cumulative, length_penalty(a.step), a.blocked_token, *results)
    return results


def triton_reasons(a: Arguments) -> list[str]:
    reasons = triton.reasons(a.logits)
    limits = zip(("beams", "tokens"), a.logits.shape[1:], (MAX_BEAMS, MAX_VOCABULARY), strict=True)
    return reasons + [
        f"the Triton kernel supports up to {most} {name}, got {size}" for name, size, most in limits if size > most
    ]


def fake(a: Arguments) -> Step:
    scores = a.cumulative.new_empty(a.logits.shape[:2])
    origin = scores.new_empty(scores.shape, dtype=torch.long)
    return scores, torch.empty_like(scores), origin, torch.empty_like(origin)


SPEC = Spec(
    name="beam_step",
    arguments=Arguments,
    results=("scores (batch, beams)", "cumulative", "origin", "tokens"),
    eager=reference,
    make_inputs=make_inputs,
    edge_cases=(
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
    count_flops=lambda a: 4 * a.logits.numel(),
    kept=("cumulative",),
)

OP: Op[Step] = Op(
    SPEC,
    [
        Backend("cpu", run_cpu, lambda a: cpu.reasons(a.logits), devices=("cpu",)),
        Backend("triton", run_triton, triton_reasons, devices=triton.DEVICES),
        Backend("torch", run_torch, differentiable=True),
    ],
    fake=fake,
    check=check,
)


@OP.public
def beam_step(logits: Tensor, cumulative: Tensor, *, step: int, min_length: int, end_token_id: int) -> Step:
    """The best `beams` continuations among beams × vocabulary, best first.

    The score of a continuation is its log-probability divided by the length penalty of this step.

    Args:
        logits: `(batch, beams, vocabulary)`. cumulative: log-probabilities of the beams, float32, `(batch, beams)`.
        step: from 0. min_length: `end_token_id` is impossible while step < min_length.

    Returns scores (float32), new cumulative log-probabilities, the beam that each came from and its token (int64), all
    `(batch, beams)`.

    Raises:
        ValueError: mismatched shapes, or an end token outside the vocabulary.
        TypeError: cumulative is not float32.
    """
    return OP(logits, cumulative, step, min_length, end_token_id)

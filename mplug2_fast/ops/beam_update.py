"""Updates the beams and the best finished hypotheses after a step of beam search."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from mplug2_fast.ops.runtime import triton
from mplug2_fast.ops.runtime.backend import Backend
from mplug2_fast.ops.runtime.op import Op
from mplug2_fast.ops.runtime.spec import Spec

BeamState = tuple[Tensor, Tensor, Tensor, Tensor]
"""sequences, done, best_sequences, best_scores."""

MAX_BEAMS, MAX_KEPT, MAX_LENGTH = 32, 32, 1024
"""Limits of the Triton kernel."""


class Arguments(NamedTuple):
    scores: Annotated[Tensor, "(batch, beams), float32"]
    origin: Annotated[Tensor, "(batch, beams)"]
    tokens: Annotated[Tensor, "(batch, beams)"]
    sequences: Annotated[Tensor, "(batch, beams, length)"]
    done: Annotated[Tensor, "(batch,)"]
    best_sequences: Annotated[Tensor, "(batch, kept, length)"]
    best_scores: Annotated[Tensor, "(batch, kept), float32"]
    step: int
    last: bool
    end_token_id: int


def make_inputs(
    generator: torch.Generator,
    *,
    batch: int,
    beams: int,
    kept: int,
    length: int,
    step: int = 2,
    last: bool = False,
) -> Arguments:
    """A quarter of the tokens end a hypothesis, a quarter of the videos are done, half of the kept ones are empty."""

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    # No two scores are equal, in any dtype.
    order = torch.rand(batch, kept + beams, generator=generator).argsort(dim=1) * -0.125
    best_scores = order[:, :kept].clone()
    best_scores[:, (kept + 1) // 2 :] = -torch.inf
    return Arguments(
        scores=order[:, kept:].clone(),
        origin=whole(beams, batch, beams),
        tokens=whole(4, batch, beams),
        sequences=whole(100, batch, beams, length),
        done=whole(4, batch) == 0,
        best_sequences=whole(100, batch, kept, length),
        best_scores=best_scores,
        step=step,
        last=last,
        end_token_id=2,
    )


def check(a: Arguments) -> None:
    batch = a.scores.shape[:1].numel()
    if (
        (a.scores.dim(), a.sequences.dim(), a.best_sequences.dim()) != (2, 3, 3)
        or not a.scores.shape == a.origin.shape == a.tokens.shape == a.sequences.shape[:2]
        or a.done.shape != (batch,)
        or a.best_scores.shape != a.best_sequences.shape[:2]
        or a.best_sequences.shape[::2] != a.sequences.shape[::2]
    ):
        raise ValueError(
            "scores, origin and tokens must be (batch, beams), sequences (batch, beams, length), done (batch,), "
            "best_sequences (batch, kept, length) and best_scores (batch, kept), got "
            + ", ".join(str(tuple(t.shape)) for t in a[:7])
        )
    length = a.sequences.shape[2]
    if not 0 <= a.step < length - 1:
        raise ValueError(f"sequences of length {length} have no position for the tokens of step {a.step}")


def reference(a: Arguments) -> BeamState:
    """The new state, operation by operation. A wider dtype would change nothing."""
    sequences = a.sequences.gather(1, a.origin[:, :, None].expand_as(a.sequences))
    sequences[:, :, a.step + 1] = a.tokens
    ended = a.tokens == a.end_token_id
    now_done = torch.ones_like(a.done) if a.last else ended[:, 0]
    stored = (ended | now_done[:, None]) & ~a.done[:, None]
    candidates = torch.cat([a.best_scores, a.scores.masked_fill(~stored, -torch.inf)], dim=1)
    # Stable: among equal scores the older hypothesis and the better beam come first.
    best_scores, picks = candidates.sort(dim=1, descending=True, stable=True)
    kept = a.best_sequences.shape[1]
    best_scores, picks = best_scores[:, :kept].contiguous(), picks[:, :kept]
    candidates = torch.cat([a.best_sequences, sequences], dim=1)
    best_sequences = candidates.gather(1, picks[:, :, None].expand_as(a.best_sequences))
    return sequences, a.done | now_done, best_sequences, best_scores


def run_triton(a: Arguments) -> BeamState:
    given = [t.contiguous() for t in a[:7]]
    results = tuple(torch.empty_like(t) for t in given[3:])
    if a.sequences.shape[0]:
        given[4] = given[4].view(torch.uint8)
        bytes_ = (results[0], results[1].view(torch.uint8), *results[2:])
        triton.kernels("beam_update").beam_update(*given, bytes_, a.step, a.last, a.end_token_id)
    return results


def triton_reasons(a: Arguments) -> list[str]:
    if found := triton.error():
        return [found]
    sizes = (
        ("beams", a.scores.shape[1], MAX_BEAMS),
        ("kept hypotheses", a.best_scores.shape[1], MAX_KEPT),
        ("tokens per sequence", a.sequences.shape[2], MAX_LENGTH),
    )
    return [f"the Triton kernel supports up to {most} {name}, got {size}" for name, size, most in sizes if size > most]


SPEC = Spec(
    name="beam_update",
    arguments=Arguments,
    results=("sequences", "done", "best_sequences", "best_scores"),
    eager=reference,
    make_inputs=make_inputs,
    edge_cases=(
        *(
            {"batch": 4, "beams": beams, "kept": kept, "length": length, "step": step, "last": last}
            for beams, kept, length in ((1, 1, 4), (5, 1, 16), (5, 5, 13), (3, 7, 9))
            for step, last in ((0, False), (2, True))
        ),
        {"batch": 2, "beams": 32, "kept": 32, "length": 40, "step": 38, "last": True},
        {"batch": 0, "beams": 3, "kept": 1, "length": 5},
    ),
    models={
        "base": {"batch": 1, "beams": 5, "kept": 1, "length": 16},
        "large": {"batch": 1, "beams": 5, "kept": 1, "length": 16},
    },
    count_flops=lambda a: 2 * a.scores.numel(),
    kept=("scores", "best_scores"),
)

OP: Op[BeamState] = Op(
    SPEC,
    [
        Backend("triton", run_triton, triton_reasons, devices=triton.DEVICES),
        Backend("torch", reference, differentiable=True),
    ],
    fake=lambda a: tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in a[3:7]),
    check=check,
)


@OP.public
def beam_update(
    scores: Tensor,
    origin: Tensor,
    tokens: Tensor,
    sequences: Tensor,
    done: Tensor,
    best_sequences: Tensor,
    best_scores: Tensor,
    *,
    step: int,
    last: bool,
    end_token_id: int,
) -> BeamState:
    """Appends the tokens to the beams, and stores finished hypotheses.

    A beam is stored when its token is the end token. All beams of a video are stored when its best beam ends, and at
    the last step. A video that was done before stores nothing.

    Args:
        scores, origin, tokens: from `beam_step`, `(batch, beams)`.
        sequences: `(batch, beams, length)`, tokens up to position `step`. done: `(batch,)`, bool.
        best_sequences: `(batch, kept, length)`. best_scores: `(batch, kept)`, float32, -inf for empty places.
        step: from 0; tokens go to position step + 1. last: whether this is the last step.

    Returns new sequences, done, best_sequences and best_scores, the best first.

    Raises:
        ValueError: mismatched shapes, or no position step + 1.
    """
    return OP(scores, origin, tokens, sequences, done, best_sequences, best_scores, step, last, end_token_id)

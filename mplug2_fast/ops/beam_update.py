"""What a step of beam search found, entered into its books: the beams' words, and the best hypotheses so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mplug2_fast.ops.runtime import triton
from mplug2_fast.ops.runtime.dispatch import Backend, Op
from mplug2_fast.ops.runtime.spec import Spec

Books = tuple[Tensor, Tensor, Tensor, Tensor]

MAX_BEAMS, MAX_KEPT, MAX_LENGTH = 32, 32, 1024
"""Of the Triton kernel."""


def reference(
    scores: Tensor,
    origin: Tensor,
    tokens: Tensor,
    sequences: Tensor,
    done: Tensor,
    best_sequences: Tensor,
    best_scores: Tensor,
    step: int,
    last: bool,
    end_token_id: int,
    *,
    upcast: bool = False,
) -> Books:
    """The books, operation by operation; nothing is computed that a wider type would change."""
    sequences = sequences.gather(1, origin[:, :, None].expand_as(sequences))
    sequences[:, :, step + 1] = tokens
    ended = tokens == end_token_id
    now_done = torch.ones_like(done) if last else ended[:, 0]
    stored = (ended | now_done[:, None]) & ~done[:, None]
    candidates = torch.cat([best_scores, scores.masked_fill(~stored, -torch.inf)], dim=1)
    # Stable: of equal scores the older hypothesis and the better beam come first.
    best_scores, picks = candidates.sort(dim=1, descending=True, stable=True)
    kept = best_sequences.shape[1]
    best_scores, picks = best_scores[:, :kept].contiguous(), picks[:, :kept]
    candidates = torch.cat([best_sequences, sequences], dim=1)
    best_sequences = candidates.gather(1, picks[:, :, None].expand_as(best_sequences))
    return sequences, done | now_done, best_sequences, best_scores


def make(
    generator: torch.Generator,
    *,
    batch: int,
    beams: int,
    kept: int,
    length: int,
    step: int = 2,
    last: bool = False,
) -> dict[str, Any]:
    """A quarter of the words end a hypothesis, a quarter of the videos are done, half of the kept ones are empty."""

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    # No two are equal, which one after the other in any dtype would not be either.
    order = torch.rand(batch, kept + beams, generator=generator).argsort(dim=1) * -0.125
    best_scores = order[:, :kept].clone()
    best_scores[:, (kept + 1) // 2 :] = -torch.inf
    return {
        "scores": order[:, kept:].clone(),
        "origin": whole(beams, batch, beams),
        "tokens": whole(4, batch, beams),
        "sequences": whole(100, batch, beams, length),
        "done": whole(4, batch) == 0,
        "best_sequences": whole(100, batch, kept, length),
        "best_scores": best_scores,
        "step": step,
        "last": last,
        "end_token_id": 2,
    }


def run_triton(
    scores: Tensor,
    origin: Tensor,
    tokens: Tensor,
    sequences: Tensor,
    done: Tensor,
    best_sequences: Tensor,
    best_scores: Tensor,
    step: int,
    last: bool,
    end_token_id: int,
) -> Books:
    given = [t.contiguous() for t in (scores, origin, tokens, sequences, done, best_sequences, best_scores)]
    results = tuple(torch.empty_like(t) for t in given[3:])
    if sequences.shape[0]:
        given[4] = given[4].view(torch.uint8)
        bytes_ = (results[0], results[1].view(torch.uint8), *results[2:])
        triton.kernels("beam_update").beam_update(*given, bytes_, step, last, end_token_id)
    return results


def triton_reasons(scores: Tensor, *others: Any) -> list[str]:
    if found := triton.error():
        return [found]
    sequences, best_scores = others[2], others[5]
    sizes = (
        ("beams", scores.shape[1], MAX_BEAMS),
        ("kept hypotheses", best_scores.shape[1], MAX_KEPT),
        ("words a sequence", sequences.shape[2], MAX_LENGTH),
    )
    return [
        f"the Triton kernel holds a video in registers, of up to {most} {name}, not {size}"
        for name, size, most in sizes
        if size > most
    ]


def check(
    scores, origin, tokens, sequences, done, best_sequences, best_scores, step, last, end_token_id
) -> None:  # fmt: skip
    batch = scores.shape[:1].numel()
    if (
        (scores.dim(), sequences.dim(), best_sequences.dim()) != (2, 3, 3)
        or not scores.shape == origin.shape == tokens.shape == sequences.shape[:2]
        or done.shape != (batch,)
        or best_scores.shape != best_sequences.shape[:2]
        or best_sequences.shape[::2] != sequences.shape[::2]
    ):
        raise ValueError(
            "scores, origin and tokens must be (batch, beams), sequences (batch, beams, length), done (batch,), "
            "best_sequences (batch, kept, length) and best_scores (batch, kept), got "
            + ", ".join(
                str(tuple(t.shape)) for t in (scores, origin, tokens, sequences, done, best_sequences, best_scores)
            )
        )
    if not 0 <= step < sequences.shape[2] - 1:
        raise ValueError(f"step {step} has no place for its words in sequences of {sequences.shape[2]}")


SPEC = Spec(
    name="beam_update",
    axes={
        "scores": "(batch, beams), float32",
        "origin": "(batch, beams)",
        "tokens": "(batch, beams)",
        "sequences": "(batch, beams, length)",
        "done": "(batch,)",
        "best_sequences": "(batch, kept, length)",
        "best_scores": "(batch, kept), float32",
        "result": "sequences, done, best_sequences, best_scores",
    },
    reference=reference,
    make=make,
    awkward=(
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
    flops=lambda scores, **_: 2 * scores.numel(),
    kept=("scores", "best_scores"),
)

OP = Op(
    SPEC,
    "(Tensor scores, Tensor origin, Tensor tokens, Tensor sequences, Tensor done, Tensor best_sequences, "
    "Tensor best_scores, int step, bool last, int end_token_id) -> (Tensor, Tensor, Tensor, Tensor)",
    [
        Backend("triton", run_triton, triton_reasons, devices=triton.DEVICES),
        Backend("torch", reference, differentiable=True),
    ],
    fake=lambda *arguments: tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in arguments[3:7]
    ),
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
) -> Books:
    """Extends the beams by their words and stores hypotheses: a beam whose word is the end token, and all beams of a
    video whose best beam ended, or at the last step; none of a video that was done before.

    Args:
        scores, origin, tokens: of `beam_step`, `(batch, beams)`.
        sequences: `(batch, beams, length)`, words up to position `step`. done: `(batch,)`, bool.
        best_sequences: `(batch, kept, length)`. best_scores: `(batch, kept)`, float32, -inf for none.
        step: from 0; words go to position step + 1. last: whether no step follows.

    Returns new sequences, done, best_sequences and best_scores, the best first.

    Raises:
        ValueError: shapes that do not go together, or no position step + 1.
    """
    return (  # type: ignore[return-value]
        scores, origin, tokens, sequences, done, best_sequences, best_scores, step, last, end_token_id
    )  # fmt: skip

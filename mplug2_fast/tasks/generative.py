"""Shared by tasks that generate text: targets, options of beam search, and texts from token ids."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.outputs import GenerationOutput
from mplug2_fast.tasks.base import Alternative, Task, Texts, not_finite, require, wide

BEFORE_LAST = slice(None, -1)
"""The positions of a sequence that predict another token of it."""

IGNORED = -100
"""Target of a position that the loss ignores."""


def shifted_labels(input_ids: Tensor, pad_token_id: int, prompt_tokens: int = 0) -> Tensor:
    """Targets `(..., tokens - 1)` of teacher forcing. Padding and the first `prompt_tokens` after [CLS] are ignored."""
    labels = input_ids[..., 1:].long()
    labels = labels.masked_fill(labels == pad_token_id, IGNORED)
    labels[..., :prompt_tokens] = IGNORED
    return labels


def token_losses(logits: Tensor, labels: Tensor, soft: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """The cross-entropy of each position, 0 where the label is `IGNORED`.

    Args:
        logits: `(N, tokens, vocabulary)`. labels: `(N, tokens)`.
        soft: logits of a teacher, as `logits`. Its probabilities over the vocabulary have the weight `alpha` in the
            targets; the labels have the rest.
    """
    scores = wide(logits).flatten(0, 1)
    losses = F.cross_entropy(scores, labels.flatten(), reduction="none", ignore_index=IGNORED).view(labels.shape)
    if soft is None or alpha == 0:
        return losses
    softened = F.cross_entropy(scores, wide(soft).flatten(0, 1).softmax(dim=-1), reduction="none").view(labels.shape)
    return (1 - alpha) * losses + alpha * softened.masked_fill(labels == IGNORED, 0.0)


def search_options(
    task: Task,
    model: Any,
    *,
    num_beams: int | None = None,
    num_return: int = 1,
    min_length: int | None = None,
    max_length: int | None = None,
) -> dict[str, int]:
    """All options of beam search: what is None has the configuration's default, or else its family's for the task.

    Raises `ConfigError` for options that contradict each other or the model.
    """
    defaults, positions = model.config.generation, model.config.text.max_position_embeddings
    lengths = model.config.lengths.get(task.name, task.lengths)
    shortest, longest = (
        next(value for value in values if value is not None)
        for values in zip((min_length, max_length), (defaults.min_length, defaults.max_length), lengths, strict=True)
    )
    beams = defaults.num_beams if num_beams is None else num_beams
    require(beams >= 1, f"num_beams must be at least 1, got {beams}")
    require(num_return >= 1, f"num_return must be at least 1, got {num_return}")
    require(1 <= longest <= positions, f"max_length must be from 1 to {positions}, got {longest}")
    require(0 <= shortest <= longest, f"min_length must be from 0 to max_length, {longest}; got {shortest}")
    return {"num_beams": beams, "num_return": num_return, "min_length": shortest, "max_length": longest}


def text_options(task: Task, model: Any, **options: Any) -> dict[str, int]:
    """As `search_options`, for callers that get every text they ask for: at most as many as there are beams."""
    filled = search_options(task, model, **options)
    beams, wanted = filled["num_beams"], filled["num_return"]
    require(wanted <= beams, f"num_return must be from 1 to num_beams, {beams}; got {wanted}")
    return filled


def texts_of(output: GenerationOutput, text_of: Callable[[Sequence[int]], str], model: Any) -> list[Texts]:
    """The hypotheses of each video as texts, best first. Rows that only pad, whose scores are -inf, are left out."""
    return [
        [
            Alternative(text_of(ids), score)
            for ids, score in zip(sequences, scores, strict=True)
            if not math.isinf(score)
        ]
        if math.isfinite(scores[0]) and not any(math.isnan(score) or score == math.inf for score in scores)
        else not_finite(next(model.parameters()).dtype)
        for sequences, scores in zip(output.sequences.tolist(), output.scores.tolist(), strict=True)
    ]

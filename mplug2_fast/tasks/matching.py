"""Scores of texts with images or videos, and the matching of the most similar pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.nn.parts import linear, plain
from mplug2_fast.tasks.base import wide

LEFT_OUT = -100.0
"""Score of a pair that was not compared."""

MATCHING_TOKENS = 8192
"""Maximum number of text tokens, padding included, that one fusion computes at once."""


class Scores(NamedTuple):
    """How well visual inputs and texts match.

    Attributes:
        by_visual: `(N, M)`; row i ranks the texts for visual input i. by_text: `(M, N)`.
        similarities: `(N, M)`, cosines of the features.

    Scores of features in half precision are computed in float32.
    """

    by_visual: Tensor
    by_text: Tensor
    similarities: Tensor


class Candidates(NamedTuple):
    """The pairs that matching scores.

    Attributes:
        by_visual: `(N, M)`, the best texts of each visual input. by_text: `(M, N)`.
    """

    by_visual: Tensor
    by_text: Tensor

    @property
    def any(self) -> Tensor:
        """`(N, M)`, the candidates of either side."""
        return self.by_visual | self.by_text.T


def candidates(similarities: Tensor, k: int) -> Candidates:
    """The k best of each row and of each column of similarities `(N, M)`. Raises `ValueError` for a k below 1."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    rows, columns = (
        torch.zeros_like(each, dtype=torch.bool).scatter_(1, each.topk(min(k, each.shape[1]), dim=1).indices, True)
        for each in (similarities, similarities.T)
    )
    return Candidates(rows, columns)


def match_pairs(model: Any, visual_of: Any, text: Tensor, text_mask: Tensor, wanted: Tensor) -> Tensor:
    """The matching logits of the wanted pairs, 0 elsewhere: `(N, M)`, float32 or wider.

    Args:
        visual_of: returns the image_embeds `(1, S, D)` of a visual input, by its number. It is called once for each.
            Keys and values are computed once for all texts of an input, up to `MATCHING_TOKENS`.
        text: `(M, tokens, D)`. text_mask: `(M, tokens)`. wanted: `(N, M)`. All three may be on another device than the
            model, such as the CPU.
    """
    logits = wide(torch.zeros(wanted.shape, dtype=text.dtype, device=text.device))
    for row in wanted.any(dim=1).nonzero()[:, 0].tolist():
        visual = visual_of(row)
        for chosen in wanted[row].nonzero()[:, 0].split(max(1, MATCHING_TOKENS // text.shape[1])):
            some, mask = text[chosen].to(visual.device), text_mask[chosen].to(visual.device)
            if model.fusion.can_pack():
                fused = model.fusion.first_tokens(some, mask, visual[0])
            else:
                fused = model.fusion(some[None], mask[None], visual)[1][0, :, 0]
            logits[row, chosen] = _exact_logits(model.matching, fused)[:, 1].to(logits.device)
    return logits


def _exact_logits(head: nn.Module, fused: Tensor) -> Tensor:
    """The head's result in float32: many logits that are rounded to 8 bits are equal, and have no rank."""
    if not plain(head):
        return wide(linear(head, fused))
    return F.linear(wide(fused), wide(head.weight), wide(head.bias))


def matched(model: Any, visual: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """The logits (no match, match) of each text with its visual input: `(B, texts, 2)`.

    Args:
        visual: `(B, S, D)`. text: `(B, texts, tokens, D)`. text_mask: `(B, texts, tokens)`.
    """
    _, fused = model.fusion(text, text_mask, visual)
    return linear(model.matching, fused[..., 0, :])


def rerank(
    model: Any, visual_of: Any, text: Tensor, text_mask: Tensor, similarities: Tensor, k: int, *, add_similarity: bool
) -> Scores:
    """Scores by matching of the k most similar pairs of each row and column; the rest get -100.

    Args:
        visual_of, text, text_mask: as for `match_pairs`. similarities: `(N, M)`.
        add_similarity: whether the score is the matching logit plus the similarity.
    """
    wanted = candidates(similarities, k)
    scores = match_pairs(model, visual_of, text, text_mask, wanted.any).to(similarities.dtype)
    if add_similarity:
        scores = scores + similarities
    by_visual, by_text = torch.full_like(scores, LEFT_OUT), torch.full_like(scores.T, LEFT_OUT)
    by_visual[wanted.by_visual] = scores[wanted.by_visual]
    by_text[wanted.by_text] = scores.T[wanted.by_text]
    return Scores(by_visual, by_text, similarities)

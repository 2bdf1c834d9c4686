"""Contrast: projections of visual inputs and texts into one space, and the loss of queries among many keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.nn.parts import linear

TEMPERATURE = 0.07
"""The learned temperature at the start."""

KEY_BLOCK = 4096
"""Keys that queries are compared with at once."""


class Contrast(nn.Module):
    """Two projections and a learned temperature.

    Args:
        dim: channels of both sides. embed_dim: channels of the common space.

    Source: ALBEF's contrast, as mPLUG (arXiv 2205.12005, section 3.3) has it.
    """

    def __init__(self, dim: int, embed_dim: int) -> None:
        super().__init__()
        self.vision_proj = nn.Linear(dim, embed_dim)
        self.text_proj = nn.Linear(dim, embed_dim)
        self.temperature = nn.Parameter(torch.empty(1))  # FSDP2 shards no scalars

    def reset_parameters(self) -> None:
        nn.init.constant_(self.temperature, TEMPERATURE)

    def visual(self, tokens: Tensor) -> Tensor:
        """Class tokens `(B, dim)`, or `(B, frames, dim)`, whose projections are averaged, to `(B, embed_dim)` of norm
        1."""
        projected = linear(self.vision_proj, tokens)
        return F.normalize(projected if projected.dim() == 2 else projected.mean(dim=1), dim=-1)

    def text(self, tokens: Tensor) -> Tensor:
        """Class tokens `(B, dim)` to `(B, embed_dim)` of norm 1."""
        return F.normalize(linear(self.text_proj, tokens), dim=-1)


def contrast_within(logits: Tensor, ids: Tensor) -> Tensor:
    """The mean cross-entropy of the rows and columns of logits `(B, B)`. Pairs with equal ids are equally right."""
    same = (ids[:, None] == ids).to(logits.dtype)
    targets = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class Keys(NamedTuple):
    """Features that queries are compared with.

    Attributes:
        features: `(dim, keys)`, a view of a queue or the transpose of a batch. ids: `(keys,)`.
    """

    features: Tensor
    ids: Tensor


def contrast_loss(
    queries: Tensor,
    ids: Tensor,
    keys: Sequence[Keys],
    temperature: Tensor,
    *,
    teacher: Tensor | None = None,
    alpha: float = 0.0,
) -> Tensor:
    """The mean cross-entropy of queries among keys.

    The targets of a query are equal for all keys of its id, mixed with the probabilities that a teacher gives. No
    tensor of all queries and keys exists: scores are computed in blocks of keys, and again for the gradient. Keys and
    teacher get no gradient. Keys may change before the backward pass. Second derivatives raise an error.

    Args:
        queries: `(B, dim)`. ids: `(B,)`; each has a key.
        keys: of several sources, such as the batch and a queue.
        temperature: `(1,)`, by which scores are divided.
        teacher: `(B, dim)`, whose scores with the keys have the weight `alpha` in the targets.
    """
    wide = torch.float64 if queries.dtype is torch.float64 else torch.float32
    weight = alpha if teacher is not None else 0.0
    with torch.autocast(queries.device.type, enabled=False):
        scaled = None if weight == 0 else teacher.detach().to(wide) / temperature.detach().to(wide)
        flat = [each for pair in keys for each in pair]
        return _ContrastLoss.apply(queries.to(wide), temperature.to(wide), ids, scaled, weight, *flat)


class _ContrastLoss(torch.autograd.Function):
    """The gradient is computed with the loss, because a queue may change before the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, temperature: Tensor, ids: Tensor, teacher: Tensor | None, alpha: float, *keys: Tensor
    ) -> Tensor:
        scaled, zero = queries / temperature, queries.new_zeros(len(queries))
        total = soft_total = zero - torch.inf  # logarithms of sums of exponentials
        right = count = expected = zero
        for features, same in _blocks(ids, keys, scaled.dtype):
            scores = scaled @ features
            total = torch.logaddexp(total, scores.logsumexp(dim=1))
            right, count = right + (scores * same).sum(dim=1), count + same.sum(dim=1)
            if teacher is not None:
                soft = teacher @ features
                grown = torch.logaddexp(soft_total, soft.logsumexp(dim=1))
                seen = ((soft - grown[:, None]).exp_() * scores).sum(dim=1)
                expected, soft_total = expected * (soft_total - grown).exp() + seen, grown
        if any(ctx.needs_input_grad):
            moved, hard = torch.zeros_like(queries), (1 - alpha) / count
            for features, same in _blocks(ids, keys, scaled.dtype):
                slope = (scaled @ features).sub_(total[:, None]).exp_().sub_(same * hard[:, None])
                if teacher is not None:
                    slope.sub_((teacher @ features).sub_(soft_total[:, None]).exp_(), alpha=alpha)
                moved.addmm_(slope, features.T)
            moved /= len(queries) * temperature
            # Scores are queries · keys / temperature.
            ctx.save_for_backward(moved, -(moved * queries).sum() / temperature)
        return (total - (1 - alpha) * right / count - alpha * expected).mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("contrast with queues has no second derivative: leave out create_graph=True")
        of_queries, of_temperature = ctx.saved_tensors
        return gradient * of_queries, gradient * of_temperature, *[None] * (len(ctx.needs_input_grad) - 2)


def _blocks(ids: Tensor, keys: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Views `(dim, block)` of the keys, and which of them each query matches `(B, block)`. Keys of another dtype are
    copied."""
    for features, of_keys in zip(keys[::2], keys[1::2], strict=True):
        for some, numbers in zip(features.split(KEY_BLOCK, dim=1), of_keys.split(KEY_BLOCK), strict=True):
            yield some.to(dtype), ids[:, None] == numbers

"""Texts of different lengths side by side in one tensor, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """Neighbouring texts of one length.

    Attributes:
        rows: of the packed tensor. texts, tokens: their number, and the length of each.
        mask: `(texts, tokens)`, nonzero for tokens; None without padding.
    """

    rows: slice
    texts: int
    tokens: int
    mask: Tensor | None

    def of(self, packed: Tensor) -> Tensor:
        """The group's part of `(rows, ...)`: `(texts, tokens, ...)`, a view."""
        return packed[self.rows].unflatten(0, (self.texts, self.tokens))


class Packing(NamedTuple):
    """How the tokens of padded texts are packed, the shortest texts first.

    Attributes:
        order: `(texts,)`, the original number of each packed text.
        places: `(rows,)`, the place of each row among the `texts·tokens` padded ones.
        first: `(texts,)`, the row of the first token of each text.
        groups: of equal lengths, in order.
        first_only: whether a layer computes only the first token of each text.
    """

    order: Tensor
    places: Tensor
    first: Tensor
    groups: tuple[Group, ...]
    first_only: bool = False

    @classmethod
    def of(cls, mask: Tensor, *, skip_last: int = 0) -> Packing:
        """Packs texts with the mask `(texts, tokens)`, nonzero for tokens. Each keeps at least one token.

        On a GPU all texts have the length of the longest, because small kernels would cost more than padding does.

        Args:
            skip_last: tokens to leave out at the end of each text.
        """
        steps = torch.arange(mask.shape[1], device=mask.device)
        lengths = ((steps + 1) * (mask != 0)).amax(dim=1).sub(skip_last).clamp(min=1)
        if mask.is_cuda:
            lengths = lengths.amax().expand_as(lengths)
        lengths, order = lengths.sort(stable=True)
        kept = steps < lengths[:, None]
        places = (order[:, None] * mask.shape[1] + steps)[kept]
        return cls(order, places, lengths.cumsum(0) - lengths, tuple(_groups(lengths, mask[order])))

    def pack(self, padded: Tensor) -> Tensor:
        """`(texts, tokens, ...)` to `(rows, ...)`."""
        return padded.flatten(0, 1)[self.places]

    def wanted(self, packed: Tensor) -> Tensor:
        """The tokens of `(1, rows, ...)` that a layer computes."""
        return packed[:, self.first] if self.first_only else packed

    def restore(self, texts: Tensor) -> Tensor:
        """Values of the packed texts `(texts, ...)` in the original order."""
        return torch.empty_like(texts).index_copy_(0, self.order, texts)


def _groups(lengths: Tensor, mask: Tensor) -> Iterator[Group]:
    """From sorted lengths and masks."""
    row = text = 0
    for tokens, texts in zip(*(each.tolist() for each in lengths.unique_consecutive(return_counts=True)), strict=True):
        seen = mask[text : text + texts, :tokens]
        yield Group(slice(row, row + texts * tokens), texts, tokens, None if seen.all() else seen)
        row, text = row + texts * tokens, text + texts

"""Additive attention masks as BERT code makes them, turned back into what the operators take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mplug2_fast.acceleration.swap import Unserved

_NEVER = -9000.0  # released self-attention masks add -1e4, cross-attention masks more


Known = dict[tuple[Any, ...], tuple[Tensor, Tensor, "Mask"]]
"""Masks that were looked at before, each with a copy of its values then, by identity and the sizes of the call."""


class Mask(NamedTuple):
    """Which keys are seen: `visible` `(batch, keys)`, None for all; `causal`, query i sees keys up to i."""

    visible: Tensor | None = None
    causal: bool = False


def understand(mask: Tensor | None, x: Tensor, memory: Tensor, known: Known | None) -> Mask:
    """A mask `(batch or 1, 1, 1 or queries, keys)` of zeros and large negatives, to add. Raises `Unserved` for others.

    Args:
        x: `(batch, queries, channels)`. memory: `(batch, keys, channels)`.
        known: where masks are found again.
    """
    if x.dim() != 3 or memory.dim() != 3 or x.shape[0] != memory.shape[0]:
        raise Unserved(f"inputs {tuple(x.shape)} and {tuple(memory.shape)} are not of one batch")
    if mask is None:
        return Mask()
    sizes = (x.shape[0], x.shape[1], memory.shape[1])
    if known is None:
        return _look(mask, *sizes)
    key = (id(mask), *sizes)
    if key in known and torch.equal(known[key][1], mask):
        return known[key][2]
    found = _look(mask, *sizes)
    known[key] = (mask, mask.clone(), found)
    return found


def _look(mask: Tensor, batch: int, queries: int, keys: int) -> Mask:
    shapes = [(rows, 1, some, keys) for rows in (1, batch) for some in (1, queries)]
    if not mask.is_floating_point() or tuple(mask.shape) not in shapes:
        raise Unserved(f"an attention mask of {mask.dtype} {tuple(mask.shape)} is not known")
    hidden = mask[:, 0] <= _NEVER
    if not bool(((mask[:, 0] == 0) | hidden).all()):
        raise Unserved("an attention mask holds more than zeros and large negatives")
    seen = ~hidden  # (batch, 1 or queries, keys)
    visible = seen[:, -1]
    causal = False
    if seen.shape[1] > 1:
        triangle = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril()
        causal = torch.equal(seen, visible[:, None] & triangle)
        if not causal and not torch.equal(seen, visible[:, None].expand_as(seen)):
            raise Unserved("an attention mask is neither causal nor the same for all queries")
    if not bool((visible[:, 0] if causal else visible.any(dim=1)).all()):
        raise Unserved("an attention mask leaves a query without any key")
    return Mask(None if bool(visible.all()) else visible.expand(batch, -1), causal)

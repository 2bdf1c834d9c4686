"""Turns the additive attention masks of BERT code back into what the operators take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mplug2_fast.acceleration.swap import Unserved

_HIDDEN = -9000.0  # official self-attention masks add -1e4, cross-attention masks less


Known = dict[tuple[Any, ...], tuple[Tensor, Tensor, "Mask"]]
"""Masks seen before, each with a copy of its values, by identity and the sizes of the call."""


class Mask(NamedTuple):
    """Which keys a query sees.

    Attributes:
        visible: `(batch, keys)`, or None for all.
        causal: query i sees keys up to i.
        other: a mask of any other form, unchanged.
    """

    visible: Tensor | None = None
    causal: bool = False
    other: Tensor | None = None


def form(mask: Tensor | None) -> str:
    """The form of a mask, which decides how a module reads it."""
    if mask is None:
        return "no mask"
    return "a boolean mask" if mask.dtype is torch.bool else "an additive mask"


def understand(mask: Tensor | None, x: Tensor, memory: Tensor, known: Known | None) -> Mask:
    """Reads a mask `(batch or 1, heads or 1, queries or 1, keys)`, additive, or boolean with True for visible keys.

    Args:
        x: `(batch, queries, channels)`.
        memory: `(batch, keys, channels)`.
        known: masks seen before, which this call adds to.

    Raises:
        Unserved: any other mask.
    """
    if x.dim() != 3 or memory.dim() != 3 or x.shape[0] != memory.shape[0]:
        raise Unserved(f"inputs {tuple(x.shape)} and {tuple(memory.shape)} do not have the same batch size")
    if mask is None:
        return Mask()
    sizes = (x.shape[0], x.shape[1], memory.shape[1])
    if known is None:
        return _look(mask, *sizes, as_is=x.is_cpu and x.dtype is torch.float32)
    key = (id(mask), *sizes)
    if key in known and torch.equal(known[key][1], mask):
        return known[key][2]
    found = _look(mask, *sizes)
    known[key] = (mask, mask.clone(), found)
    return found


def _look(mask: Tensor, batch: int, queries: int, keys: int, *, as_is: bool = False) -> Mask:
    fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[2] in (1, queries) and mask.shape[3] == keys
    is_bool = mask.dtype is torch.bool
    if not fits or not (is_bool or mask.is_floating_point()):
        raise Unserved(f"it was called with an unknown attention mask: {mask.dtype} {tuple(mask.shape)}")
    seen = mask if is_bool else mask > _HIDDEN
    if not bool(seen.any(dim=-1).all()):
        raise Unserved("an attention mask hides all keys from a query")
    if is_bool and as_is:  # PyTorch's attention accepts it and is as fast in float32
        return Mask(other=mask)
    if mask.shape[1] > 1 or not (is_bool or bool((mask.masked_fill(~seen, 0) == 0).all())):
        return Mask(other=mask)
    seen = seen[:, 0]  # (1 or batch, 1 or queries, keys)
    visible = seen[:, -1]
    causal = False
    if seen.shape[1] > 1:
        triangle = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril()
        causal = queries == keys and torch.equal(seen, visible[:, None] & triangle)
        if not causal and not torch.equal(seen, visible[:, None].expand_as(seen)):
            return Mask(other=mask)
    if causal and not bool(visible[:, 0].all()):
        return Mask(other=mask)
    return Mask(None if bool(visible.all()) else visible.expand(batch, -1), causal)

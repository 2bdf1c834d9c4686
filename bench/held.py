"""Models that hold a part of their weights, so that memory is that of the part."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.weights import fill


def hold(model: nn.Module, device: str, *parts: str) -> dict[str, Tensor]:
    """Gives parts of a model on the meta device memory and their seeded weights.

    Args:
        model: has `official_parameters()`.
        parts: names of modules or parameters; one that this configuration does without is passed over.

    Returns released name -> view, of all that the model holds.
    """
    for name in parts:
        owner, _, last = name.rpartition(".")
        owner = model.get_submodule(owner)
        part = getattr(owner, last, None)
        if isinstance(part, nn.Parameter):
            setattr(owner, last, nn.Parameter(torch.empty_like(part, device=device), part.requires_grad))
        elif part is not None:
            part.to_empty(device=device)
    held = {name: view for name, view in model.official_parameters().items() if not view.is_meta}
    fill(held)
    return held

"""A slowly moving copy of a model, as a source of targets in training."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class MomentumCopy(nn.Module):
    """A copy of a model, without some of its parts, that follows the model's weights.

    Args:
        model: with `official_names`.
        without: names of modules of the model that are not copied.
        momentum: share of itself that the copy keeps in an update.

    Attributes:
        model: the copy, without gradients.

    Source: ALBEF's momentum distillation; the official `*_m` modules of mPLUG and mPLUG-2.
    """

    def __init__(self, model: Any, *, without: Iterable[str] = (), momentum: float = 0.995) -> None:
        super().__init__()
        left_out = [getattr(model, name) for name in without if getattr(model, name, None) is not None]
        # deepcopy takes what is in its memo as already copied.
        self.model = copy.deepcopy(model, {id(module): None for module in left_out}).requires_grad_(False)
        self._momentum = momentum

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """copy = momentum · copy + (1 - momentum) · model."""
        current = dict(model.named_parameters())
        own = dict(self.model.named_parameters())
        torch._foreach_lerp_(list(own.values()), [current[name] for name in own], 1 - self._momentum)

    def official_parameters(self) -> dict[str, Tensor]:
        """The official name of each momentum parameter, such as `text_encoder_m.…`, -> a detached view."""
        kept = {name for name, _ in self.model.named_parameters()}
        views = self.model.official_names.views(self.model, only=kept)
        return {"_m.".join(name.split(".", 1)): view for name, view in views.items() if "." in name}

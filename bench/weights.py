"""Seeded weights under official names: the same values for every implementation, none of them zero.

A new model cannot be used: its local temporal modules compute nothing, and all its scores are alike.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def official_weight(name: str, shape: torch.Size, seed: int = 0) -> Tensor:
    """The float32 value, on the CPU, of the official parameter `name`. It depends on the arguments alone.

    Linear layers keep the variance of their input and norms are near the identity. Word embeddings are large enough
    for the decoder to be sure of some words.
    """
    noise = seeded_noise(f"{seed}:{name}", *shape)
    if len(shape) == 1 and name.endswith(".weight"):
        return noise.mul_(0.1).add_(1.0)
    if "word_embeddings" in name or "position_embeddings" in name or "token_type_embeddings" in name:
        return noise.mul_(3.0 / math.sqrt(shape[1]))
    if "positional_embedding" in name or "class_embedding" in name:
        return noise.mul_(0.5)
    if "latents" in name:
        return noise
    if len(shape) == 1:
        return noise.mul_(0.1)
    return noise.mul_(1.0 / math.sqrt(math.prod(shape[1:])))


def seeded_noise(name: str, *shape: int) -> Tensor:
    """Mean 0, variance 1. It depends on the arguments alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.rand(shape, generator=generator).sub_(0.5).mul_(math.sqrt(12))


@torch.no_grad()
def fill(parameters: Mapping[str, Tensor], seed: int = 0) -> None:
    """Writes the values into a model's `official_parameters()`, of any dtype and device."""
    for name, parameter in parameters.items():
        parameter.copy_(official_weight(name, parameter.shape, seed))


def allocate(model: nn.Module, device: str, *parts: str) -> dict[str, Tensor]:
    """Allocates parts of a model on the meta device and fills them with seeded weights, so that memory is that of the
    parts.

    Args:
        model: has `official_parameters()`.
        parts: names of modules or parameters. One that is None in this configuration is skipped.

    Returns official name -> view, for every allocated parameter.
    """
    for name in parts:
        owner, _, last = name.rpartition(".")
        owner = model.get_submodule(owner)
        part = getattr(owner, last, None)
        if isinstance(part, nn.Parameter):
            setattr(owner, last, nn.Parameter(torch.empty_like(part, device=device), part.requires_grad))
        elif part is not None:
            part.to_empty(device=device)
    views = {name: view for name, view in model.official_parameters().items() if not view.is_meta}
    fill(views)
    return views

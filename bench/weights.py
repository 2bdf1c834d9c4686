"""Seeded weights under released names: the same values for every implementation, none of them zero.

A fresh model would not do: its local temporal modules compute nothing and its scores are all alike.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor


def released_weight(name: str, shape: torch.Size, seed: int = 0) -> Tensor:
    """The float32 value, on the CPU, of the released parameter `name`; a function of its arguments alone.

    Linear layers keep the variance of their input, norms are near the identity, and the word embeddings are large
    enough for the decoder to be sure of some words.
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
    """Mean 0, variance 1; a function of its arguments alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.rand(shape, generator=generator).sub_(0.5).mul_(math.sqrt(12))


@torch.no_grad()
def fill(parameters: Mapping[str, Tensor], seed: int = 0) -> None:
    """Writes the values into a model's `official_parameters()`, of any dtype and device."""
    for name, parameter in parameters.items():
        parameter.copy_(released_weight(name, parameter.shape, seed))

"""Small models without zero weights, for tests that compare implementations."""

from __future__ import annotations

import torch
from torch import Tensor

import mplug2_fast as mf

SMALL = mf.MPlug2Config.preset("tiny").replace(
    width=64,
    layers=2,
    hidden_size=64,
    num_attention_heads=2,
    intermediate_size=96,
    vocab_size=200,
    num_latents=7,
    min_length=None,
    max_length=None,
)


def randomise(model: torch.nn.Module, seed: int = 0, scale: float = 1.0) -> torch.nn.Module:
    """Fills every parameter, also those that start at zero or one, from the released names, so that two implementations
    of one configuration and seed compute the same function."""
    for key, view in sorted(model.official_parameters().items()):
        generator = torch.Generator().manual_seed(hash_name(key) + seed)
        noise = torch.randn(view.shape, generator=generator)
        if view.ndim == 0:  # a temperature
            noise = 0.05 + 0.01 * noise.abs()
        elif view.ndim == 1:
            noise = 0.1 * noise + (1.0 if key.endswith(".weight") else 0.0)
        elif "embedding" in key or "latents" in key:
            noise = 0.5 * noise
        else:
            noise = scale * noise / view[0].numel() ** 0.5
        view.copy_(noise)
    return model.eval()


def hash_name(key: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(key)) % 2**31


def pair(
    config: mf.MPlug2Config, task: str = "captioning", seed: int = 0, scale: float = 1.0
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(reference, fast) with the same weights."""
    name = {"captioning": "MPlug2ForCaptioning", "question_answering": "MPlug2ForQuestionAnswering"}[task]
    return tuple(randomise(getattr(library, name)(config), seed, scale) for library in (mf.reference, mf))


def random_video(config: mf.MPlug2Config, batch: int = 2, frames: int | None = None, seed: int = 0) -> Tensor:
    vision = config.vision
    shape = (batch, 3, frames or vision.num_frames, vision.image_size, vision.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_text(
    config: mf.MPlug2Config, rows: int, tokens: int, seed: int = 0, padded: bool = True
) -> tuple[Tensor, Tensor]:
    """Ids that start with [CLS] and masks; each row but the first is one token shorter than the row before."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(103, config.text.vocab_size, (rows, tokens), generator=generator)
    ids[:, 0] = 101
    lengths = tokens - torch.arange(rows) % (tokens - 1) if padded else torch.full((rows,), tokens)
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    return ids * mask, mask

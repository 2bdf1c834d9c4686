"""Training with one picture of each emoji: it is deformed and recolored at random, and finds its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from examples.proofs.emoji import TRAINED, content, names, on_white, pictures
from mplug2_fast.datasets import Item
from mplug2_fast.tasks import ZeroShot
from mplug2_fast.text import Tokenizer
from mplug2_fast.training import Sample

TEXTS = 250
"""Encoded at once."""
DETAIL = 48
"""Side of the pictures before they are deformed."""
CELLS = 4
"""Along each side. Their corners move, and what is between them follows."""
TURN, STRETCH, SHIFT, BEND = 12.0, 0.15, 0.12, 0.08
"""Degrees, logarithm, and shares of half a side."""
MIX, BALANCE, GRAY, LIGHT = 0.2, 0.4, 0.05, 0.2
"""Of the channels, logarithm, share of the pictures, of values from 0 to 1."""
FILTERS = (ImageFilter.MinFilter(3), ImageFilter.MaxFilter(3), ImageFilter.BoxBlur(1), ImageFilter.SHARPEN, None, None)


class Names(ZeroShot):
    """The name of a picture, among all names, and the picture of a name, among those of the batch."""

    def __init__(self) -> None:
        super().__init__(names())
        self._texts: dict[str, Tensor] = {}

    def batch(self, items: Sequence[Item], tokenizer: Tokenizer, config: Any) -> dict[str, Tensor]:
        if not self._texts:
            ids, mask = config.wording.descriptions(tokenizer, self.labels, video=False, training=True)
            self._texts = {"text_ids": ids, "text_mask": mask}
        return {**self._texts, "ids": torch.tensor([self.labels.index(str(item.label)) for item in items])}

    def targets(self, batch: Mapping[str, Tensor], config: Any) -> int:
        return len(batch["ids"])

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """The mean cross-entropy of pictures among all names and of names among the pictures of the batch, plus that of
        these names among all names.

        Similar names start with nearly equal features, and pictures then learn equal ones too. The last part keeps the
        names apart.

        Args:
            model: with the modules of this task.
            batch: `video` `(B, 3, 1, H, W)`; `text_ids`, `text_mask` `(names, tokens)` of all names; `ids` `(B,)`, the
                numbers of the names of the pictures.
        """
        ids = batch["ids"]
        with sdpa_kernel(SDPBackend.MATH):  # For so few tokens on a CPU it takes a third of the time of the fast one.
            visual = model.visual_features(model.encode_image(batch["video"][:, :, 0], "frame"))
            text = features_of(model, batch["text_ids"], batch["text_mask"])
        logits = (visual @ text.T / model.contrast.temperature).float()
        same = (ids[:, None] == ids).float()
        of_names = F.cross_entropy(logits[:, ids].T, same / same.sum(dim=1, keepdim=True))
        apart = F.cross_entropy((text[ids] @ text.T / model.contrast.temperature.detach()).float(), ids)
        return (F.cross_entropy(logits, ids) + of_names) / 2 + apart


def features_of(model: Any, text_ids: Tensor, text_mask: Tensor) -> Tensor:
    """The features `(texts, embed_dim)` of texts `(texts, tokens)`, encoded in groups of similar length."""
    lengths = text_mask.sum(dim=1)
    order = lengths.argsort()
    found = []
    for rows in order.split(TEXTS):
        longest = int(lengths[rows].max())
        found.append(model.text_features(model.encode_text(text_ids[rows, :longest], text_mask[rows, :longest])))
    return torch.cat(found)[order.argsort()]


class Emoji:
    """Pictures of the trained design, each deformed and recolored at random."""

    def __init__(self, config: Any) -> None:
        self._size = config.vision.image_size
        self._pictures = [content(picture, DETAIL) for picture in pictures(TRAINED)]

    def __len__(self) -> int:
        return len(self._pictures)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        picture = deformed(self._pictures[index], self._size, rng)
        opaque = np.asarray(picture)[..., 3:] / np.float32(255)
        frame = np.asarray(thickened(on_white(picture), rng)) / np.float32(255)
        frame = (recolored(frame, opaque, rng) * 255).round().astype(np.uint8)
        return Sample(Item(id=(name := names()[index]), label=name), frame[None])


def deformed(picture: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """The picture with `size` pixels on each side, turned, stretched, shifted and bent."""
    one, other = np.deg2rad(rng.uniform(-TURN, TURN, 2))
    x, y = np.exp(rng.uniform(-STRETCH, STRETCH, 2))
    axes = np.array([[np.cos(one) * x, np.sin(one) * x], [-np.sin(other) * y, np.cos(other) * y]])
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, CELLS + 1)] * 2), axis=-1)
    grid = grid @ axes + rng.uniform(-SHIFT, SHIFT, 2) + rng.normal(scale=BEND * rng.random(), size=grid.shape)
    grid, cell = (grid + 1) / 2 * picture.width, size // CELLS
    corners = np.concatenate([grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:]], axis=2).reshape(-1, 8)
    boxes = [(x, y, x + cell, y + cell) for y in range(0, size, cell) for x in range(0, size, cell)]
    mesh = list(zip(boxes, corners.tolist(), strict=True))
    return picture.transform((size, size), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def thickened(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture with thicker or thinner lines, or smoother, or as it is."""
    chosen = FILTERS[rng.integers(len(FILTERS))]
    return picture if chosen is None else Image.blend(picture, picture.filter(chosen), rng.uniform(0.2, 0.8))


def recolored(frame: np.ndarray, opaque: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The frame `(height, width, 3)`, from 0 to 1, in other colors and another light. White stays white.

    opaque: `(height, width, 1)`, where the light falls.
    """
    strength = rng.random()
    mix = np.eye(3) + rng.normal(scale=MIX * strength, size=(3, 3))
    gamma = np.exp(strength * (rng.uniform(-BALANCE, BALANCE, 3) + rng.uniform(-BALANCE, BALANCE)))
    frame = np.clip(1 - (1 - frame) @ mix.astype(np.float32), 1e-3, 1) ** gamma.astype(np.float32)
    if rng.random() < GRAY:
        frame = frame.mean(axis=2, keepdims=True).repeat(3, axis=2)
    spots = Image.fromarray(rng.normal(scale=LIGHT * rng.random(), size=(3, 3)).astype(np.float32))
    light = np.asarray(spots.resize(frame.shape[1::-1], Image.Resampling.BICUBIC))[..., None]
    return np.clip(frame + light * opaque, 0, 1)

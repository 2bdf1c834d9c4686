"""Emoji in two designs: pictures and names of Google's to train on, Twitter's pictures to find by their names.

`npm install --prefix FOLDER emoji-datasource-google emoji-datasource-twitter` gets them. Set EMOJI_FOLDER to
FOLDER/node_modules.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance

from mplug2_fast.datasets import Item
from mplug2_fast.text import Tokenizer
from mplug2_fast.training import Sample
from mplug2_fast.training.data import video_of

FOLDER = "EMOJI_FOLDER"
SIDE = 64
WHITE = (255, 255, 255)
TRAINED, HELD_OUT = "google", "twitter"


def package(style: str) -> Path:
    """The folder of a design's package. Raises `FileNotFoundError` if it is not there."""
    if FOLDER not in os.environ:
        raise FileNotFoundError(f"{FOLDER} is not set: examples/proofs/emoji.py says how to get the pictures")
    return Path(os.environ[FOLDER]) / f"emoji-datasource-{style}"


@functools.cache
def names() -> list[str]:
    """The names of all emoji. They differ."""
    emoji = json.loads((package(TRAINED) / "emoji.json").read_text(encoding="utf-8"))
    count = Counter(each["name"] for each in emoji)
    return [(e["name"] if count[e["name"]] == 1 else e["short_name"].replace("_", " ")).lower() for e in emoji]


@functools.cache
def pictures(style: str) -> list[Image.Image]:
    """The pictures of a design with transparent backgrounds, in the order of `names`."""
    emoji = json.loads((package(TRAINED) / "emoji.json").read_text(encoding="utf-8"))
    folder = package(style) / "img" / style / str(SIDE)
    return [Image.open(folder / each["image"]).convert("RGBA") for each in emoji]


def on(color: tuple[int, ...], picture: Image.Image, size: int) -> Image.Image:
    """The picture on a background, with `size` pixels on each side."""
    whole = Image.new("RGBA", picture.size, (*color, 255))
    whole.alpha_composite(picture)
    return whole.convert("RGB").resize((size, size), Image.Resampling.BOX)


class Emoji:
    """Pictures of the trained design, each turned, scaled, shifted and recolored at random."""

    def __init__(self, config: Any) -> None:
        self._size = config.vision.image_size
        self._names, self._pictures = names(), pictures(TRAINED)

    def __len__(self) -> int:
        return len(self._names)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        turn, scale = np.deg2rad(rng.uniform(-15, 15)), np.exp(rng.uniform(-0.25, 0.25, 2))
        x, y = SIDE / 2 + rng.uniform(-6, 6, 2)
        (a, b), (c, d) = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) / scale[:, None]
        inverse = (a, b, SIDE / 2 - a * x - b * y, c, d, SIDE / 2 - c * x - d * y)
        placed = self._pictures[index].transform(
            (SIDE, SIDE), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR
        )
        color = WHITE if rng.random() < 0.7 else tuple(rng.integers(256, size=3).tolist())
        picture = on(color, placed, self._size)
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            picture = change(picture).enhance(float(np.exp(rng.uniform(-0.35, 0.35))))
        hue = np.eye(3) + rng.normal(scale=0.08, size=(3, 3))
        frame = np.clip(np.asarray(picture, np.float32) @ hue, 0, 255).astype(np.uint8)
        return Sample(Item(id=self._names[index], caption=(self._names[index],)), frame[None])


def held_out(config: Any) -> list[Sample]:
    """The pictures of the other design on white."""
    size = config.vision.image_size
    frames = [np.asarray(on(WHITE, picture, size))[None] for picture in pictures(HELD_OUT)]
    return [Sample(Item(id=name, caption=(name,)), frame) for name, frame in zip(names(), frames, strict=True)]


def recalls(similarities: torch.Tensor) -> tuple[float, float]:
    """Recall at 1 of names by pictures and of pictures by names, where picture i has name i."""
    right = torch.arange(len(similarities))
    return tuple(float((similarities.argmax(dim=dim) == right).float().mean()) for dim in (1, 0))  # type: ignore[return-value]


@torch.inference_mode()
def score(model: Any, tokenizer: Tokenizer) -> tuple[float, dict[str, float]]:
    """Recall at 1 of names by pictures of the other design, and of pictures by names."""
    samples, visual, text = held_out(model.config), [], []
    for start in range(0, len(samples), 100):
        some = samples[start : start + 100]
        visual.append(model.visual_features(model.encode_video(video_of(some, model.config.vision.image_size))))
        ids, mask = model.config.wording.descriptions(
            tokenizer, [each.item.id for each in some], video=False, training=False
        )
        text.append(model.text_features(model.encode_text(ids, mask)))
    by_pictures, by_names = recalls(torch.cat(visual) @ torch.cat(text).T)
    return by_pictures, {"pictures_by_names": by_names}


def nearest() -> dict[str, float]:
    """The same recalls by the distance between pixels: the name of a picture is that of the nearest trained picture."""
    size = SIDE // 2
    pixels = [
        torch.tensor(np.stack([np.asarray(on(WHITE, each, size), np.float32).ravel() for each in pictures(style)]))
        for style in (HELD_OUT, TRAINED)
    ]
    by_pictures, by_names = recalls(-torch.cdist(*pixels))
    return {"nearest_in_pixels": by_pictures, "pictures_by_nearest": by_names}

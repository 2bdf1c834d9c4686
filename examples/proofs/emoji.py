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
from PIL import Image
from torch.nn import functional as F

from mplug2_fast.datasets import Item
from mplug2_fast.text import Tokenizer
from mplug2_fast.training import Sample
from mplug2_fast.training.data import video_of

FOLDER = "EMOJI_FOLDER"
SIDE = 64
FAINT = 32
"""Opacity that does not count as content."""
MARGIN = 1
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


def content(picture: Image.Image, size: int) -> Image.Image:
    """What is opaque, in the middle of a square with `size` pixels on each side. Colors are multiplied by opacity."""
    box = picture.getchannel("A").point(lambda a: 255 * (a > FAINT)).getbbox()
    found = picture.crop(box).convert("RGBa")
    side = max(found.size)
    square = Image.new("RGBa", (side, side))
    square.paste(found, ((side - found.width) // 2, (side - found.height) // 2))
    inner = square.resize((size - 2 * MARGIN, size - 2 * MARGIN), Image.Resampling.BOX)
    whole = Image.new("RGBa", (size, size))
    whole.paste(inner, (MARGIN, MARGIN))
    return whole


def on_white(picture: Image.Image) -> Image.Image:
    """A picture whose colors are multiplied by opacity, on white."""
    pixels = np.asarray(picture)
    return Image.fromarray(pixels[..., :3] + (255 - pixels[..., 3:]))


def held_out(config: Any) -> list[Sample]:
    """The pictures of the other design."""
    size = config.vision.image_size
    frames = [np.asarray(on_white(content(picture, size)))[None] for picture in pictures(HELD_OUT)]
    return [Sample(Item(id=name), frame) for name, frame in zip(names(), frames, strict=True)]


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
    """The same recalls without a model: the name of a picture is that of the nearest trained one.

    "In pixels" is by distance. "In content" is by correlation of the content alone, which is what the model sees.
    """
    half, quarter = SIDE // 2, SIDE // 4
    whole, inner = [], []
    for style in (HELD_OUT, TRAINED):
        shown = [on_white(each.convert("RGBa")).resize((half, half), Image.Resampling.BOX) for each in pictures(style)]
        whole.append(_pixels(shown))
        pixels = _pixels([on_white(content(each, quarter)) for each in pictures(style)])
        inner.append(F.normalize(pixels - pixels.mean(dim=1, keepdim=True), dim=1))
    by_pictures, by_names = recalls(-torch.cdist(*whole))
    in_content, by_content = recalls(inner[0] @ inner[1].T)
    return {
        "nearest_in_pixels": by_pictures,
        "pictures_by_nearest": by_names,
        "nearest_in_content": in_content,
        "pictures_by_nearest_in_content": by_content,
    }


def _pixels(shown: list[Image.Image]) -> torch.Tensor:
    return torch.tensor(np.stack([np.asarray(each, np.float32).ravel() for each in shown]))

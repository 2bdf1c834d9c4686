"""Pictures of two to four shapes, and phrases that name one of them: "the square left of the blue circle"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.moving_shapes.data import SAMPLES
from examples.moving_shapes.generator import COLORS, SHAPES, Scenes, boxes, training_picture
from examples.proofs.pictures import CLEAR, DIRECTIONS, direction, look, scattered, still
from mplug2_fast.datasets import Item
from mplug2_fast.tasks.grounding import Grounding, corners, iou
from mplug2_fast.text import Tokenizer
from mplug2_fast.training import Sample
from mplug2_fast.training.data import video_of

HELD_OUT = 1_000
BINS = 32
"""Boxes of training are rounded to multiples of 1 / BINS."""
RADIUS = (0.09, 0.125)
MISLEADING = 0.6
"""The share of pictures of three or more shapes in which another shape of that noun is farther in the direction."""
FARTHER = 0.02
PHRASES = 4
"""Of each training picture."""
ALONE = 0.3
"""The share of training pictures of one shape. They teach to find a shape before one must be chosen."""
KINDS = ("a color", "a shape and a direction", "a color and a direction", "a direction")


class Phrase(NamedTuple):
    """A phrase, how it names it, the shape that it names, and whether that is the farthest of its noun."""

    text: str
    kind: str
    named: int
    farthest: bool


def phrases(color: np.ndarray, shape: np.ndarray, center: np.ndarray) -> Iterator[Phrase]:
    """All phrases that name one shape, by its color alone or by its direction from a shape with a look of its own."""
    looks = [look(*each) for each in zip(color, shape, strict=True)]
    for i in range(len(looks)):
        same_color, same_shape = np.flatnonzero(color == color[i]), np.flatnonzero(shape == shape[i])
        named = f"the {list(COLORS)[color[i]]} shape"
        if len(same_color) == 1:
            yield Phrase(named, KINDS[0], i, True)
        if looks.count(looks[i]) == 1:
            yield Phrase(f"the {looks[i]}", "a color and a shape", i, True)
        nouns = (f"the {SHAPES[shape[i]]}", same_shape), (named, same_color), ("the shape", np.arange(len(looks)))
        for kind, (noun, alike) in zip(KINDS[1:], nouns, strict=True):
            for other in range(len(looks)):
                if other == i or len(alike) < 2 or looks.count(looks[other]) > 1:
                    continue
                where = direction(center, i, other)
                found = [direction(center, j, other) for j in alike if j != other]
                if all(found) and found.count(where) == 1:
                    axis, sign = DIRECTIONS[where]
                    farthest = alike[np.argmax(sign * center[alike, axis])] == i
                    yield Phrase(f"{noun} {where} the {looks[other]}", kind, i, bool(farthest))


def misleading(center: np.ndarray) -> np.ndarray:
    """Whether the third shape is farther than the first in the first one's direction from the second, but in another
    direction from it: `(draws,)` of centers `(draws, n, 2)`."""
    first, third = center[:, 0] - center[:, 1], center[:, 2] - center[:, 1]
    axis = np.abs(first).argmax(1)[:, None]
    along, across, along_3, across_3 = (
        np.take_along_axis(vector, x, 1)[:, 0] for vector in (first, third) for x in (axis, 1 - axis)
    )
    clear = (np.abs(along) > CLEAR * np.abs(across)) & (np.abs(across_3) > CLEAR * np.abs(along_3))
    return clear & (along_3 * np.sign(along) > np.abs(along) + FARTHER)


def drawn(rng: np.random.Generator, alone: float = 0.0) -> tuple[Scenes, Phrase, list[Phrase]]:
    """Shapes, a phrase about them, and all phrases about them. All kinds of the first are equally likely.

    Args:
        alone: the share of pictures of one shape.
    """
    kind, n = KINDS[rng.integers(len(KINDS))], int(rng.integers(2, 5))
    if rng.random() < alone:
        kind, n = KINDS[0], 1
    farthest = kind == KINDS[0] or n < 3 or rng.random() >= MISLEADING
    while True:
        radius, center = scattered(rng, n, RADIUS, None if farthest else misleading)
        color, shape = (rng.choice(len(all_), 3, replace=False)[rng.integers(3, size=n)] for all_ in (COLORS, SHAPES))
        if not farthest and kind != KINDS[3]:
            same = shape if kind == KINDS[1] else color
            same[2] = same[0]
        every = list(phrases(color, shape, center))
        found = [each for each in every if each.kind == kind and each.farthest == farthest]
        if found:
            return still(rng, color, shape, center, radius), found[rng.integers(len(found))], every


class Phrases(Grounding):
    """Grounding of several phrases in each picture, which is encoded once."""

    def batch(self, items: Sequence[Item], tokenizer: Tokenizer, config: Any) -> dict[str, Tensor]:
        pairs = [each for item in items for each in zip(item.caption, item.extra["boxes"], strict=True)]
        return super().batch([Item(id="", text=text, box=box) for text, box in pairs], tokenizer, config)

    def loss(self, model: Any, batch: Mapping[str, Any], **options: Any) -> Tensor:
        embeds = model.encode_video(batch["video"])
        embeds = embeds.repeat_interleave(len(batch["text_ids"]) // len(embeds), dim=0)
        return super().loss(model, {**batch, "video": None, "image_embeds": embeds}, **options)


class Several:
    """Pictures with phrases and the boxes of the shapes that they name."""

    def __init__(self, config: Any) -> None:
        self._size = config.vision.image_size

    def __len__(self) -> int:
        return SAMPLES

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        scenes, phrase, every = drawn(rng, ALONE)
        chosen = [phrase, *(every[i] for i in rng.integers(len(every), size=PHRASES - 1))]
        places = [tuple(each) for each in (np.round(boxes(scenes, 0) * BINS) / BINS).tolist()]
        item = Item(
            id="", caption=tuple(each.text for each in chosen), extra={"boxes": [places[each.named] for each in chosen]}
        )
        return Sample(item, training_picture(scenes, rng, self._size))


def held_out(config: Any) -> list[Sample]:
    """Pictures that no training run has, with exact boxes. The label is the kind of the phrase."""
    found = []
    for i in range(HELD_OUT):
        scenes, phrase, _ = drawn(rng := np.random.default_rng([2, i]))
        item = Item(id="", text=phrase.text, box=tuple(boxes(scenes, 0)[phrase.named].tolist()), label=phrase.kind)
        found.append(Sample(item, training_picture(scenes, rng, config.vision.image_size)))
    return found


@torch.inference_mode()
def score(model: Any, tokenizer: Tokenizer) -> tuple[float, dict[str, float]]:
    """The share of boxes with an IoU of at least 0.5, the mean IoU, and shares of each kind of phrase."""
    samples, respond, found = held_out(model.config), model.tasks["grounding"].respond(model, tokenizer), []
    for start in range(0, len(samples), 100):
        some = samples[start : start + 100]
        embeds = model.encode_video(video_of(some, model.config.vision.image_size))
        found += [each[0].box for each in respond(embeds, [sample.item.text for sample in some])]
    overlap = iou(*(corners(torch.tensor(each)) for each in (found, [sample.item.box for sample in samples])))
    right = (overlap >= 0.5).float()
    kinds = {kind: torch.tensor([sample.item.label == kind for sample in samples]) for kind in KINDS}
    shares = {f"named_by_{kind.replace(' ', '_')}": float(right[of].mean()) for kind, of in kinds.items()}
    return float(right.mean()), {"mean_IoU": float(overlap.mean()), **shares}


def rules() -> dict[str, float]:
    """How often a random shape of the picture is right, and the shape of that noun that is farthest in the direction.

    The second rule is right for phrases without a direction, and never uses the shape from which the direction is told.
    """
    found = [drawn(np.random.default_rng([2, i])) for i in range(HELD_OUT)]
    return {
        "a_random_shape": float(np.mean([1 / len(scenes) for scenes, _, _ in found])),
        "the_farthest_of_its_noun": float(np.mean([phrase.farthest for _, phrase, _ in found])),
    }

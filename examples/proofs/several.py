"""Pictures of two to four shapes, phrases that name one of them, and boxes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch

from examples.moving_shapes.data import SAMPLES
from examples.moving_shapes.generator import boxes, training_picture
from examples.proofs.phrases import KINDS, drawn
from mplug2_fast.datasets import Item
from mplug2_fast.tasks.grounding import corners, iou
from mplug2_fast.text import Tokenizer
from mplug2_fast.training import Sample
from mplug2_fast.training.data import video_of

HELD_OUT = 1_000
PHRASES = 6
"""Of each training picture."""


class Several:
    """Pictures with phrases and the boxes of the shapes that they name.

    Phrases are grouped by their kind, and by whether they name the farthest shape of their noun. All groups of a
    picture are equally frequent.
    """

    def __init__(self, config: Any) -> None:
        self._size = config.vision.image_size

    def __len__(self) -> int:
        return SAMPLES

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        scenes, phrase, every = drawn(rng)
        groups = Counter((each.kind, each.farthest) for each in every)
        weights = np.array([1 / groups[each.kind, each.farthest] for each in every]) / len(groups)
        chosen = rng.choice(len(every), PHRASES - 1, replace=len(every) < PHRASES - 1, p=weights)
        chosen = [phrase, *(every[i] for i in chosen)]
        places = [tuple(each) for each in boxes(scenes, 0).tolist()]
        extra = {"boxes": [places[each.named] for each in chosen], "last": [places[each.last] for each in chosen]}
        item = Item(id="", caption=tuple(each.text for each in chosen), extra=extra)
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
    """The share of boxes with an IoU of at least 0.5, the mean IoU, and the shares for both sorts of phrases."""
    samples, respond, found = held_out(model.config), model.tasks["grounding"].respond(model, tokenizer), []
    for start in range(0, len(samples), 100):
        some = samples[start : start + 100]
        embeds = model.encode_video(video_of(some, model.config.vision.image_size))
        found += [each[0].box for each in respond(embeds, [sample.item.text for sample in some])]
    overlap = iou(*(corners(torch.tensor(each)) for each in (found, [sample.item.box for sample in samples])))
    right = (overlap >= 0.5).float()
    by_color = torch.tensor([sample.item.label == KINDS[0] for sample in samples])
    return float(right.mean()), {
        "mean_IoU": float(overlap.mean()),
        "by_color_alone": float(right[by_color].mean()),
        "by_direction": float(right[~by_color].mean()),
    }


def rules() -> dict[str, float]:
    """How often a random shape of the picture is right, and the shape of that noun that is farthest in the direction.

    The second rule ignores the other shape of the phrase. It is always right for phrases without a direction.
    """
    found = [drawn(np.random.default_rng([2, i])) for i in range(HELD_OUT)]
    return {
        "a_random_shape": float(np.mean([1 / len(scenes) for scenes, _, _ in found])),
        "the_farthest_of_its_noun": float(np.mean([phrase.farthest for _, phrase, _ in found])),
    }

"""Pictures of two shapes, and captions such as "a red square left of a blue circle", or with the shapes swapped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mplug2_fast as mf
from examples.moving_shapes.data import SAMPLES
from examples.moving_shapes.generator import COLORS, SHAPES, training_picture
from examples.proofs.pictures import direction, look, scattered, still
from mplug2_fast.datasets import Item
from mplug2_fast.evaluation.recall import recalls
from mplug2_fast.tasks import Captioning, Retrieval
from mplug2_fast.text import Tokenizer
from mplug2_fast.training import Sample, load_recipe
from mplug2_fast.training.data import video_of

GALLERY = 500
RERANKED = 16
"""Candidates of each query that the matching head scores."""
ALIKE = 4
"""Pairs of pictures of a training item. All show the same two colors."""
RADIUS = (0.13, 0.18)
SAID = ("left of", "above")
"""Directions of captions. The same picture shows the other shape right of this one, or below it."""


def shuffled(text: str) -> str:
    """The words of a text in the order of the alphabet, the same for all orders of these words."""
    return " ".join(sorted(text.split()))


class Relations(Retrieval):
    """Retrieval and captions of pictures. The frames of an item are several pictures, with one caption each."""

    modules = Retrieval.modules | Captioning.modules

    @staticmethod
    def words(text: str) -> str:
        return text

    def batch(self, items: Sequence[Item], tokenizer: Tokenizer, config: Any) -> dict[str, Tensor]:
        texts = [self.words(text) for item in items for text in item.caption]
        single = [Item(id=text, caption=(text,)) for text in texts]
        return super().batch(single, tokenizer, config) | Captioning().batch(single, tokenizer, config)

    def loss(self, model: Any, batch: Mapping[str, Any], **options: Any) -> Tensor:
        pictures = batch["video"].transpose(1, 2).flatten(0, 1)
        batch = {**batch, "video": None, "image_embeds": model.encode_image(pictures)}
        return super().loss(model, batch, **options) + Captioning().loss(model, batch)


class BagOfWords(Relations):
    """The same, with texts that do not show the order of their words."""

    words = staticmethod(shuffled)


class Swapped:
    """Pictures of two shapes, each with the picture in which the two have changed places."""

    def __init__(self, config: Any) -> None:
        self._size = config.vision.image_size

    def __len__(self) -> int:
        return SAMPLES

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        return self.pair(rng.choice(len(COLORS) * len(SHAPES), 2, replace=False), rng)

    def pair(self, looks: np.ndarray, rng: np.random.Generator) -> Sample:
        """Two pictures of shapes of these looks `(2,)`."""
        where = ""
        while where not in SAID:
            radius, center = scattered(rng, 2, RADIUS)
            where = direction(center, 0, 1)
        names = [look(*divmod(int(each), len(SHAPES))) for each in looks]
        first, second = (f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names)
        color, shape = np.divmod(looks, len(SHAPES))
        places = center, center[::-1]
        scenes = [still(rng, color, shape, each, np.full(2, radius.min())) for each in places]
        frames = np.concatenate([training_picture(each, rng, self._size) for each in scenes])
        return Sample(Item(id="", caption=(f"{first} {where} {second}", f"{second} {where} {first}")), frames)


class Alike(Swapped):
    """Several such pairs. All shapes have one of two colors, so captions differ in shapes, directions and order."""

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        colors, pairs = rng.integers(len(COLORS), size=2), []
        while len(pairs) < ALIKE:
            looks = colors * len(SHAPES) + rng.integers(len(SHAPES), size=2)
            if looks[0] != looks[1]:
                pairs.append(self.pair(looks, rng))
        captions = tuple(text for each in pairs for text in each.item.caption)
        return Sample(Item(id="", caption=captions), np.concatenate([each.frames for each in pairs]))


def held_out(config: Any) -> list[Sample]:
    """Pictures that no training run has, two by two, all with different captions."""
    data, found, i = Swapped(config), {}, 0
    while len(found) < GALLERY // 2:
        sample = data.sample(i, np.random.default_rng([2, i]))
        found.setdefault(frozenset(sample.item.caption), sample)
        i += 1
    return list(found.values())


@torch.inference_mode()
def score(model: Any, tokenizer: Tokenizer, words: Callable[[str], str] = str) -> tuple[float, dict[str, float]]:
    """The lower of the recalls at 1 of captions and of pictures, by features alone, and all recalls."""
    samples = held_out(model.config)
    video = torch.cat([video_of([each], model.config.vision.image_size)[0].transpose(0, 1) for each in samples])
    embeds = torch.cat([model.encode_image(some) for some in video.split(100)])
    texts = [words(text) for sample in samples for text in sample.item.caption]
    ids, mask = model.config.wording.descriptions(tokenizer, texts, video=False, training=False)
    result, own = {}, torch.eye(len(texts), dtype=torch.bool)
    for name, k in (("", 0), ("_re-ranked", RERANKED)):
        found = model.predict("retrieval", image_embeds=embeds, text_ids=ids, text_mask=mask, k=k)
        result[f"captions{name}"] = recalls(found.by_visual, own)["recall@1"] / 100
        result[f"pictures{name}"] = recalls(found.by_text, own)["recall@1"] / 100
    return min(result["captions"], result["pictures"]), result


def bag_of_words() -> dict[str, float]:
    """Train a model that does not see the order of the words, in fewer steps, and score it.

    A caption and its swapped one are the same text to it, and the gallery has both, so it cannot exceed 50%.
    """
    tasks = [f"sources.{i}.task=examples.proofs.relations:BagOfWords" for i in (0, 1)]
    changes = ["out=build/proofs/bag_of_words", "steps=1_200", *tasks]
    trainer = mf.Trainer(load_recipe(Path(__file__).with_name("relations.toml"), changes))
    model = mf.from_pretrained(trainer.train())
    return {"bag_of_words": score(model, trainer.tokenizer, shuffled)[0]}

"""Moving shapes: actions of clips, and sentences about one or two frames."""

from __future__ import annotations

from typing import Any

import numpy as np

from examples.moving_shapes.data import MovingShapes
from examples.moving_shapes.generator import (
    ACTIONS,
    COLORS,
    SHAPES,
    Scenes,
    caption,
    held_out_scenes,
    sample_scenes,
    training_frames,
)
from mplug2_fast.datasets import Item
from mplug2_fast.tasks import Classification
from mplug2_fast.training import Sample

FIRST_HELD_OUT = 20_000
HELD_OUT = 1_000

LOOKS = Classification([f"{color} {shape}" for color in COLORS for shape in SHAPES], name="looks")
ENTAILMENT = Classification(("entailment", "neutral", "contradiction"), on="fused", name="entailment")
PAIRS = Classification(("false", "true"), on="two_images", name="pairs")


class Actions(MovingShapes):
    """Clips with their actions."""

    def of(self, scenes: Scenes, rng: np.random.Generator, id: str = "") -> Sample:
        item = Item(id=id, label=ACTIONS[scenes.action[0]])
        return Sample(item, training_frames(scenes, rng, self._size)[0])


class Looks(Actions):
    """Single frames with their colors and shapes."""

    def of(self, scenes: Scenes, rng: np.random.Generator, id: str = "") -> Sample:
        label = f"{list(COLORS)[scenes.color[0]]} {SHAPES[scenes.shape[0]]}"
        return Sample(Item(id=id, label=label), training_frames(scenes, rng, self._size)[0, :1])


class Entailment(Actions):
    """Single frames with a sentence each.

    A frame shows no motion. So "a red circle moves left" is neutral beside any red circle, and "a red circle" follows
    from it. A sentence with another color or shape contradicts the frame.
    """

    def of(self, scenes: Scenes, rng: np.random.Generator, id: str = "") -> Sample:
        label = ENTAILMENT.labels[rng.integers(3)]
        color, shape = int(scenes.color[0]), int(scenes.shape[0])
        if label == "contradiction":
            wrong = rng.integers(3)  # color, shape, or both
            if wrong != 1:
                color = (color + int(rng.integers(1, len(COLORS)))) % len(COLORS)
            if wrong != 0:
                shape = (shape + int(rng.integers(1, len(SHAPES)))) % len(SHAPES)
        said = Scenes(**{**vars(scenes), "color": np.array([color]), "shape": np.array([shape])})
        sentence = caption(said, 0)
        moves = label == "neutral" or (label == "contradiction" and rng.random() < 0.5)
        text = sentence if moves else sentence.removesuffix(f" {ACTIONS[scenes.action[0]]}")
        return Sample(Item(id=id, text=text, label=label), training_frames(scenes, rng, self._size)[0, :1])


class Pairs(Actions):
    """Single frames of two clips, and a sentence: "the color is the same", "it is red in both", or about the shapes.

    Half of the sentences are true. When "it is red in both" is false, one of the two frames shows it.
    """

    def of(self, scenes: Scenes, rng: np.random.Generator, id: str = "") -> Sample:
        look = ("color", "shape")[rng.integers(2)]
        true = bool(rng.integers(2))
        while (vars(other := sample_scenes(rng, 1))[look][0] == vars(scenes)[look][0]) != true:
            pass
        name = (list(COLORS) if look == "color" else SHAPES)[vars((scenes, other)[rng.integers(2)])[look][0]]
        named = f"it is {name} in both" if look == "color" else f"it is a {name} in both"
        text = named if rng.random() < 0.5 else f"the {look} is the same"
        frames = [training_frames(each, rng, self._size)[0, 0] for each in (scenes, other)]
        return Sample(Item(id=id, text=text, label=str(true).lower()), np.stack(frames))


def held_out_actions(config: Any) -> list[Sample]:
    return _held_out(Actions(config))


def held_out_entailment(config: Any) -> list[Sample]:
    return _held_out(Entailment(config))


def held_out_pairs(config: Any) -> list[Sample]:
    return _held_out(Pairs(config))


def _held_out(data: Actions) -> list[Sample]:
    scenes = held_out_scenes(HELD_OUT, FIRST_HELD_OUT)
    return [data.of(scenes[i], np.random.default_rng([2, i])) for i in range(HELD_OUT)]

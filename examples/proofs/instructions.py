"""One model that describes clips or answers questions, by instruction alone, and two models with one task each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mplug2_fast as mf
from examples.moving_shapes.data import MovingShapes
from examples.moving_shapes.generator import (
    QUESTION_KINDS,
    Scenes,
    answer,
    caption,
    held_out_scenes,
    questions,
    training_frames,
)
from mplug2_fast.datasets import Item
from mplug2_fast.training import Sample, load_recipe
from mplug2_fast.training.data import video_of

FIRST_HELD_OUT = 70_000
HELD_OUT = 500
DESCRIBE = ("describe the clip", "say what the clip shows", "caption this")
"""Instructions that ask for a caption."""


class Described(MovingShapes):
    """Clips with an instruction to describe them."""

    def of(self, scenes: Scenes, rng: np.random.Generator) -> Sample:
        sample = super().of(scenes, rng)
        item = replace(sample.item, question=str(rng.choice(DESCRIBE)), answers={caption(scenes, 0): 1.0})
        return Sample(item, sample.frames)


class Mixed(Described):
    """Clips with either an instruction to describe them or a question."""

    def of(self, scenes: Scenes, rng: np.random.Generator) -> Sample:
        return super().of(scenes, rng) if rng.integers(2) else MovingShapes.of(self, scenes, rng)


def held_out(config: Any, kind: str = "") -> list[Sample]:
    """Clips with an instruction to describe them, or with a question of a kind of `QUESTION_KINDS`."""
    scenes, size, found = held_out_scenes(HELD_OUT, FIRST_HELD_OUT), config.vision.image_size, []
    for i in range(HELD_OUT):
        frames = training_frames(scenes[i], np.random.default_rng([2, i]), size)[0]
        ways = questions(scenes, i, kind) if kind else DESCRIBE
        right = answer(scenes, i, kind) if kind else caption(scenes, i)
        found.append(Sample(Item(id="", question=ways[i % len(ways)], answers={right: 1.0}), frames))
    return found


def exact(model: Any, tokenizer: Any, kinds: tuple[str, ...]) -> float:
    """The share of texts that are exactly right, over held-out clips and all kinds."""
    task = model.tasks["question_answering"]
    respond, right = task.respond(model, tokenizer, num_beams=1), 0
    for kind in kinds:
        samples = held_out(model.config, kind)
        for start in range(0, len(samples), 50):
            some = samples[start : start + 50]
            with torch.inference_mode():
                embeds = task.encode(model, video_of(some, model.config.vision.image_size))
                found = respond(embeds, [each.item.question for each in some])
            right += sum(texts[0].text in each.item.answers for each, texts in zip(some, found, strict=True))
    return right / (len(kinds) * HELD_OUT)


def score(model: Any, tokenizer: Any) -> tuple[float, dict[str, float]]:
    """The mean of captions and answers that are exactly right, and both."""
    captions, answers = exact(model, tokenizer, ("",)), exact(model, tokenizer, QUESTION_KINDS)
    return (captions + answers) / 2, {"captions": captions, "answers": answers}


def two_models() -> dict[str, float]:
    """Train a model for captions and one for answers, as many steps each, and score them."""
    sources = {
        "captions_alone": ("examples.proofs.instructions:Described", ("",)),
        "answers_alone": ("examples.moving_shapes.data:MovingShapes", QUESTION_KINDS),
    }
    found = {}
    for name, (data, kinds) in sources.items():
        changes = [f"out=build/proofs/{name}", f"sources.0.data={data}"]
        trainer = mf.Trainer(load_recipe(Path(__file__).with_name("instructions.toml"), changes))
        found[name] = exact(mf.from_pretrained(trainer.train()), trainer.tokenizer, kinds)
    return found

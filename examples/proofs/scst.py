"""Self-critical training of an early captioner: its reward, CIDEr-D, before and after.

Run as `python -m examples.proofs.scst` from the repository root. It trains a captioner for a few steps, then by its
reward, and writes results/scst.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import typer

import mplug2_fast as mf
from examples.proofs.universal import trainer_of
from examples.proofs.unseen import FOLDER, Frames, held_out
from mplug2_fast.evaluation import tokenize
from mplug2_fast.text import Tokenizer
from mplug2_fast.training import Sample, load_recipe
from mplug2_fast.training.data import video_of
from mplug2_fast.training.scst import CiderReward

ITEMS = 2_000
EARLY = 120
"""Steps of the captioner."""


class Captioned(Frames):
    """A fixed number of training frames with their captions.

    Attributes:
        items: of the frames. The reward counts the words of their captions.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.items = [super(Captioned, self).sample(i, np.random.default_rng([3, i])).item for i in range(ITEMS)]

    def __len__(self) -> int:
        return ITEMS

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        return super().sample(index, np.random.default_rng([3, index]))


@torch.inference_mode()
def score(model: Any, tokenizer: Tokenizer, reward: CiderReward) -> dict[str, float]:
    """On held-out frames: the mean reward of all beams, that of the best, and the share of exact captions."""
    samples, rewards, exact = held_out(model.config), [], 0
    beams, wording = model.config.generation.num_beams, model.config.wording
    for start in range(0, len(samples), 100):
        some = samples[start : start + 100]
        found = model.predict("captioning", video_of(some, model.config.vision.image_size), num_return=beams).sequences
        rewards.append(reward(found, [sample.item for sample in some]))
        best = [wording.caption(tokenizer, row[0], "") for row in found.tolist()]
        exact += sum(text in sample.item.caption for text, sample in zip(best, some, strict=True))
    all_rewards = torch.cat(rewards)
    return {
        "reward": float(all_rewards.mean()),
        "reward_of_best": float(all_rewards[:, 0].mean()),
        "captions": exact / len(samples),
    }


def run(changes: Sequence[str] = ()) -> dict[str, Any]:
    """Train with CIDEr-D as the reward, and score the model before and after."""
    trainer = mf.Trainer(load_recipe(FOLDER / "scst.toml", changes))
    references = [item.caption for item in trainer.datasets[0].items]  # type: ignore[attr-defined]
    wording = trainer.model.config.wording
    reward = CiderReward(references, tokenize, lambda ids: wording.caption(trainer.tokenizer, ids, ""))
    before = score(trainer.model.eval(), trainer.tokenizer, reward)
    after = score(mf.from_pretrained(trainer.train()), trainer.tokenizer, reward)
    return {"before": before, "after": after, "seed": trainer.recipe.seed, "steps": trainer.steps}


def main() -> None:
    """Train a captioner for a few steps, go on by its reward, and write results/scst.json."""
    trainer_of("2", 0, ["out=build/proofs/captioner", f"steps={EARLY}"]).train()
    result = run()
    (FOLDER / "results/scst.json").write_text(json.dumps(result, indent=2) + "\n")
    typer.echo(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)

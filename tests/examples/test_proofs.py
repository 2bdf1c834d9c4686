"""The proofs learn, and the page shows their committed results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mplug2_fast as mf
from examples.proofs import wordnet
from examples.proofs.rows import FOLDER, ROWS, table
from mplug2_fast.training import Sample, load_recipe

PAGE = Path(__file__).parents[2] / "docs/tasks.md"
SHORT = ("steps=16", "schedule.warmup_steps=2", "schedule.kind='constant'", "sources.0.batch_size=8", "ema=0.0")


class Fixed:
    """A few samples, which a model soon knows by heart."""

    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        return self._samples[index]


@pytest.fixture(scope="module")
def nouns(tmp_path_factory):
    """A file of WordNet's form, split into training and test data."""
    folder = tmp_path_factory.mktemp("wordnet")
    lines = ["  1 a licence"]
    for i in range(40):
        thing, number = (("a small animal", "05"), ("a warm meal", "13"))[i % 2]
        lines.append(f'{i:08} {number} n 01 word 0 000 | {thing} of kind {i}; "an example"  ')
    (folder / "data.noun").write_text("\n".join(lines))
    wordnet.write(folder / "data.noun", folder)
    return folder


def test_definitions_are_split_without_examples(nouns):
    train, test = (mf.datasets.read_items(nouns, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (36, 4)
    found = {item.id: (item.text, item.label) for item in train + test}
    assert len(found) == 40
    assert found["00000003"] == ("a warm meal of kind 3", "food")


@pytest.mark.parametrize("name", ROWS)
def test_the_loss_falls(name, tmp_path, nouns):
    if ROWS[name].package:
        pytest.importorskip(ROWS[name].package)
    changes = [f"out={tmp_path}", "tensorboard=false", *SHORT]
    if name == "definitions":
        changes.append(f"sources.0.data={nouns}")
    trainer = mf.Trainer(load_recipe(FOLDER / f"{name}.toml", changes), note=lambda line: None)
    trainer.datasets = [Fixed([trainer.datasets[0].sample(i, np.random.default_rng(i)) for i in range(8)])]
    trainer.train()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_the_page_shows_the_results():
    assert table() in PAGE.read_text(encoding="utf-8")

"""The proofs learn, and the page shows their committed results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mplug2_fast as mf
from examples.proofs import definition_pairs, easy_vqa, scst, universal, unseen, wordnet
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
        words = f"02 word_{i} 0 synonym 0"
        lines.append(f'{i:08} {number} n {words} 002 @ 0000010{i % 2} n 0000 ~ 1 n 0000 | {thing} {i}; "an example"  ')
    (folder / "data.noun").write_text("\n".join(lines))
    wordnet.write(folder / "data.noun", folder)
    definition_pairs.write(folder / "data.noun", folder / "pairs")
    return folder


def test_definitions_are_split_without_examples(nouns):
    train, test = (mf.datasets.read_items(nouns, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (36, 4)
    found = {item.id: (item.text, item.label) for item in train + test}
    assert len(found) == 40
    assert found["00000003"] == ("a warm meal 3", "food")


def test_pairs_of_definitions_are_balanced_and_from_sisters(nouns):
    for split, count in (("train", 72), ("test", 8)):
        items = mf.datasets.read_items(nouns / "pairs", split)
        assert len(items) <= count
        for own, other in zip(items[::2], items[1::2], strict=True):
            assert (own.label, other.label) == ("true", "false")
            number = int(own.id.split("_")[0])
            assert own.text == other.text == f"word {number}"
            assert own.text_pair.endswith(f" {number}")
            assert own.text_pair != other.text_pair
            assert int(other.text_pair.split()[-1]) % 2 == number % 2


def test_unseen_pairs_are_not_trained():
    data = unseen.Seen(mf.MPlug2Config.preset("tiny"))
    found = {data.sample(i, np.random.default_rng(i)).item.caption[0] for i in range(400)}
    assert len(unseen.UNSEEN) == 10
    assert found == {text for i, text in enumerate(unseen.CAPTIONS) if i not in unseen.UNSEEN}


def test_frames_found_by_captions():
    right = torch.arange(len(unseen.CAPTIONS)).repeat(3)
    similarities = torch.eye(len(unseen.CAPTIONS))[right]
    assert unseen.frames_first(similarities, right, unseen.UNSEEN) == 1.0
    assert unseen.frames_first(-similarities, right, unseen.UNSEEN) == 0.0


def test_looks_follow_from_questions_and_answers(monkeypatch):
    asked = [
        ("what color is the triangle?", "red", 1),
        ("is there not a blue shape?", "no", 2),
        ("is a circle present?", "no", 2),
        ("does the image not contain a triangle?", "yes", 2),
        ("is no teal shape present?", "yes", 3),
    ]
    monkeypatch.setattr(easy_vqa, "_asked", lambda split: asked)
    assert easy_vqa.looks_of(easy_vqa.COLORS) == {1: "red", 2: "blue"}
    assert easy_vqa.looks_of(easy_vqa.SHAPES) == {1: "triangle", 2: "rectangle"}


def test_universal_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(unseen, "HELD_OUT", 300)
    layers = {name: len(universal.trainer_of(name, 0).model.universal.layers) for name in universal.VARIANTS}
    assert layers == {"0": 0, "0_unshared": 2, "1": 1, "2": 2, "3": 3}
    trainer = universal.trainer_of("1", 0, [f"out={tmp_path}", "steps=2", "sources.0.batch_size=4"])
    found = universal.score(mf.from_pretrained(trainer.train()), trainer.tokenizer)
    assert found.keys() == universal.SCORES.keys()
    assert all(0 <= value <= 2 for value in found.values())


def test_the_reward_rises(tmp_path, monkeypatch):
    monkeypatch.setattr(unseen, "HELD_OUT", 50)
    monkeypatch.setattr(scst, "ITEMS", 50)
    start = [f"out={tmp_path}", "steps=12", "tensorboard=false", f"model.checkpoint={universal.TINY}"]
    rate = ["schedule.warmup_steps=0", "optimizer.learning_rate=3e-4", "sources.0.batch_size=8"]
    found = scst.run([*start, *rate])
    assert found["after"]["reward"] > found["before"]["reward"]


@pytest.mark.parametrize("name", ROWS)
def test_the_loss_falls(name, tmp_path, nouns):
    if ROWS[name].package:
        pytest.importorskip(ROWS[name].package)
    changes, data = (
        [f"out={tmp_path}", "tensorboard=false", *SHORT],
        {"definitions": nouns, "definition_pairs": nouns / "pairs"},
    )
    if name in data:
        changes.append(f"sources.0.data={data[name]}")
    trainer = mf.Trainer(load_recipe(FOLDER / f"{name}.toml", changes), note=lambda line: None)
    trainer.datasets = [
        Fixed([data.sample(i, np.random.default_rng(i)) for i in range(8)]) for data in trainer.datasets
    ]
    trainer.train()
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for key in {key for step in steps for key in step if key.startswith("loss/")}:
        losses = [step[key] for step in steps if key in step]
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), key


def test_the_page_shows_the_results():
    page = PAGE.read_text(encoding="utf-8")
    assert table() in page
    assert universal.table() in page

"""The proofs learn, and the page shows their committed results."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import mplug2_fast as mf
from examples.proofs import (
    definition_pairs,
    easy_vqa,
    emoji,
    emoji_training,
    finding,
    phrases,
    pretrain,
    relations,
    scst,
    several,
    several_training,
    together,
    universal,
    unseen,
    wordnet,
)
from examples.proofs.rows import FOLDER, ROWS, table
from mplug2_fast.tasks import grounding
from mplug2_fast.text import SEP_TOKEN_ID
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
    parents = ["00000100", "00000101"]
    lines += [f"{n} 05 n 01 parent_{n} 0 001 @ 00000200 n 0000 | a kind of things" for n in parents]
    lines.append("00000200 05 n 01 thing 0 000 | anything")
    for i in range(37):
        thing, number = (("a small animal", "05"), ("a warm meal", "13"))[i % 2]
        words = f"02 word_{i} 0 synonym 0"
        lines.append(
            f'{i:08} {number} n {words} 002 @ {parents[i % 2]} n 0000 ~ 1 n 0000 | {thing} {i}; "an example"  '
        )
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


def test_pairs_of_definitions_are_balanced_and_from_sisters(nouns, monkeypatch):
    monkeypatch.setattr(definition_pairs, "FOLDER", nouns / "pairs")
    data, rng, labels = definition_pairs.Pairs(None), np.random.default_rng(0), Counter()
    for i in range(600):
        item = data.sample(i % len(data), rng).item
        number = int(item.text_pair.split()[-1])
        own = item.text == f"parent 0000010{number % 2}"
        assert own == (item.label == "true")
        assert item.text_pair.startswith(f"word {number}, synonym: ")
        labels[item.text, item.label] += 1
    assert len(labels) == 4
    assert all(100 < count < 200 for count in labels.values())


def test_held_out_definitions_are_not_trained(nouns):
    train, test = (
        {item.id.split("_")[0] for item in mf.datasets.read_items(nouns / "pairs", split)}
        for split in ("train", "test")
    )
    assert test
    assert not train & test


def test_unseen_pairs_are_not_trained():
    data = unseen.Seen(mf.MPlug2Config.preset("tiny"))
    found = {data.sample(i, np.random.default_rng(i)).item.caption[0] for i in range(400)}
    assert len(unseen.UNSEEN) == 10
    assert found == {text for i, text in enumerate(unseen.CAPTIONS) if i not in unseen.UNSEEN}


def test_frames_found_by_captions():
    right = torch.arange(len(unseen.CAPTIONS)).repeat(3)
    similarities = torch.eye(len(unseen.CAPTIONS))[right]
    assert finding.frames_first(similarities, right, unseen.UNSEEN) == 1.0
    assert finding.frames_first(-similarities, right, unseen.UNSEEN) == 0.0


def test_looks_follow_from_questions_and_answers(monkeypatch):
    asked = [
        ("what color is the triangle?", "red", 1),
        ("is there not a blue shape?", "no", 2),
        ("is a circle present?", "no", 2),
        ("does the image not contain a triangle?", "yes", 2),
        ("is no teal shape present?", "yes", 3),
    ]
    monkeypatch.setattr(easy_vqa, "asked", lambda split: asked)
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


@pytest.fixture
def designs(tmp_path, monkeypatch):
    """Emoji that are squares of one color each, in two designs, whose colors differ a little."""
    monkeypatch.setenv(emoji.FOLDER, str(tmp_path / "designs"))
    for style, shift in (("google", 0), ("twitter", 5)):
        folder = emoji.package(style) / "img" / style / "64"
        folder.mkdir(parents=True)
        entries = []
        for i, color in enumerate([*range(0, 250, 25), 0]):
            picture = Image.new("RGBA", (64, 64))
            picture.paste((color + shift, 255 - color, 100 * (i == 10), 255), (4, 4, 60, 60))
            picture.save(folder / f"{i}.png")
            entries.append(
                {"name": f"COLOR {i // 2}" if i < 2 else f"COLOR {i}", "short_name": f"s_{i}", "image": f"{i}.png"}
            )
        (emoji.package(style) / "emoji.json").write_text(json.dumps(entries))
    emoji.names.cache_clear()
    emoji.pictures.cache_clear()
    yield
    emoji.names.cache_clear()
    emoji.pictures.cache_clear()


def test_emoji_of_one_design_are_near_those_of_the_other(designs):
    assert emoji.names()[:3] == ["s 0", "s 1", "color 2"]
    assert set(emoji.nearest().values()) == {1.0}
    config = mf.MPlug2Config.preset("tiny")
    data, rng = emoji_training.Emoji(config), np.random.default_rng(0)
    first, second = (data.sample(3, rng) for _ in range(2))
    assert first.item.label == "color 3"
    assert first.frames.shape == (1, 32, 32, 3)
    assert (first.frames != second.frames).any()
    placed = np.asarray(emoji.on_white(emoji.content(emoji.pictures("google")[3], 32)))
    assert (placed[1:-1, 1:-1] == (75, 180, 0)).all()
    assert (placed[0] == 255).all()
    similarities = torch.tensor([[2.0, 1.0], [3.0, 0.0]])
    assert emoji.recalls(similarities) == (0.5, 0.0)


def test_features_keep_the_order_of_the_texts():
    model = mf.MPlug2(mf.MPlug2Config.preset("tiny"), tasks=["retrieval"]).eval()
    mask = (torch.arange(9) < torch.tensor([5, 2, 9, 3])[:, None]).long()
    ids = torch.randint(model.config.text.vocab_size, (4, 9)) * mask
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji_training, "TEXTS", 2)
        found = emoji_training.features_of(model, ids, mask)
        torch.testing.assert_close(found, model.text_features(model.encode_text(ids, mask)), rtol=0, atol=1e-5)


def test_emoji_without_pictures(monkeypatch):
    monkeypatch.delenv(emoji.FOLDER, raising=False)
    with pytest.raises(FileNotFoundError, match="EMOJI_FOLDER is not set"):
        emoji.package("google")


def test_pretraining_and_fine_tuning(tmp_path, monkeypatch):
    monkeypatch.setattr(unseen, "HELD_OUT", 100)
    monkeypatch.setattr(pretrain, "WINDOW", 4)
    monkeypatch.setattr(pretrain, "SEEDS", (1,))
    short = ["schedule.warmup_steps=2", "schedule.kind='constant'", "sources.0.batch_size=4"]
    sources = [f"sources.{i}.batch_size=4" for i in (1, 2)]
    found = pretrain.run([f"out={tmp_path}", "steps=16", *short, *sources], ["steps=2", *short])
    assert found["losses"].keys() == pretrain.TITLES.keys()
    for task, each in found["losses"].items():
        assert each["last"] < 0.9 * each["first"], task
    assert found["steps"] == 16
    assert found["fine_tuning_steps"] == 2
    for name in ("pretrained", "from_scratch"):
        assert found[name]["1"].keys() == universal.SCORES.keys()


def test_a_phrase_names_one_of_several_shapes():
    center = np.array([(0.2, 0.5), (0.5, 0.5), (0.1, 0.9), (0.9, 0.45)], np.float32)
    color, shape = np.array([0, 1, 0, 0]), np.array([1, 0, 1, 1])  # a circle, and squares around it
    found = {phrase.text: (phrase.named, phrase.farthest) for phrase in phrases.phrases(color, shape, center)}
    assert found["the orange shape"] == (1, True)
    assert "the square left of the orange circle" not in found  # the third is neither clearly left nor below
    center[2] = 0.4, 0.9
    found = {phrase.text: (phrase.named, phrase.farthest) for phrase in phrases.phrases(color, shape, center)}
    assert found["the square left of the orange circle"] == (0, True)
    assert found["the red shape below the orange circle"] == (2, True)
    assert found["the shape right of the orange circle"] == (3, True)
    assert not any(text.endswith("the red square") for text in found)  # there are three


def test_the_farthest_shape_may_be_another():
    config, shares = mf.MPlug2Config.preset("tiny"), several.rules()
    assert 0.3 < shares["a_random_shape"] < 0.4
    assert shares["the_farthest_of_its_noun"] < 0.75
    sample = several.Several(config).sample(0, np.random.default_rng(0))
    assert sample.frames.shape == (1, 32, 32, 3)
    assert len(sample.item.caption) == len(sample.item.extra["boxes"]) == several.PHRASES
    for text, box, last in zip(sample.item.caption, *sample.item.extra.values(), strict=True):
        assert (box == last) == (len(text.split()) == 3)  # such as "the red circle"


def test_a_coordinate_between_two_bins_is_shared_by_both():
    logits = torch.zeros(1, 1, 4, grounding.FIRST_BIN + grounding.BINS, requires_grad=True)
    model = SimpleNamespace(decoder=lambda *inputs: logits)
    several_training.soft_box_loss(model, None, torch.tensor([[0.5, 0.503125, 1.0, 0.0]]), steps=32).backward()
    targets = 1 / grounding.BINS - 4 * logits.grad[0, 0, :, grounding.FIRST_BIN :]
    middle = (grounding.BINS - 1) // 2
    expected = torch.zeros(4, grounding.BINS)
    expected[0, middle] = expected[2, -1] = expected[3, 0] = 1
    expected[1, middle], expected[1, middle + 10] = 0.9, 0.1
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-5)


def test_pairs_do_not_depend_on_their_neighbors():
    config = mf.MPlug2Config.preset("tiny")
    model = mf.MPlug2(config, tasks=[together.DEFINITION_PAIRS]).eval()
    together.start(model)
    mask = (torch.arange(12) < torch.tensor([12, 6])[:, None]).long()
    ids = torch.randint(SEP_TOKEN_ID + 1, config.text.vocab_size, (2, 12)) * mask
    ids[:, 3] = SEP_TOKEN_ID
    with torch.no_grad():
        both = together.DEFINITION_PAIRS.logits(model, {"text_ids": ids, "text_mask": mask})
        alone = together.DEFINITION_PAIRS.logits(model, {"text_ids": ids[1:, :6], "text_mask": mask[1:, :6]})
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)


def test_swapped_shapes_have_swapped_captions(monkeypatch):
    monkeypatch.setattr(relations, "GALLERY", 20)
    samples = relations.held_out(mf.MPlug2Config.preset("tiny"))
    texts = [text for sample in samples for text in sample.item.caption]
    assert len(set(texts)) == 20
    for sample in samples:
        one, other = sample.item.caption
        where = next(where for where in relations.SAID if where in one)
        assert one.split(f" {where} ") == other.split(f" {where} ")[::-1]
        assert relations.shuffled(one) == relations.shuffled(other)
        assert sample.frames.shape == (2, 32, 32, 3)


def test_alike_pictures_show_the_same_two_colors():
    sample = relations.Alike(mf.MPlug2Config.preset("tiny")).sample(0, np.random.default_rng(0))
    texts = sample.item.caption
    assert len(texts) == len(sample.frames) == 2 * relations.ALIKE
    assert len({frozenset(text.split()) & {*relations.COLORS} for text in texts}) == 1
    assert len(set(texts)) > 2


FURTHER = {row.then: row for row in ROWS.values() if row.then}
FROM_ANOTHER = {*FURTHER, "several"}
"""Recipes that go on from a model, which is not trained here."""


@pytest.mark.parametrize("name", [*ROWS, *FURTHER])
def test_the_loss_falls(name, tmp_path, nouns, designs, monkeypatch):
    monkeypatch.setattr(definition_pairs, "FOLDER", nouns / "pairs")
    if package := {**ROWS, **FURTHER}[name].package:
        pytest.importorskip(package)
    changes = [f"out={tmp_path}", "tensorboard=false", *SHORT]
    if name in FROM_ANOTHER:
        changes.append("model={preset='tiny', init='scaled'}")
    if name.startswith("definitions"):
        changes.append(f"sources.0.data={nouns}")
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
    assert pretrain.tables() in page

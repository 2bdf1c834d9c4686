"""The pictures of shapes, their texts and boxes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import mplug2_fast as mf
from examples.shapes import evaluate
from examples.shapes.data import Comparisons, Relations, example
from examples.shapes.language import ANSWERS, RELATIONS, absent, matches, vocabulary
from examples.shapes.render import draw
from examples.shapes.scenes import SIDE, caption, is_held_out
from examples.shapes.write import held_out, write
from mplug2_fast.checkpoint import from_pretrained
from mplug2_fast.datasets import read_items
from mplug2_fast.text import Tokenizer
from mplug2_fast.training import load_recipe

RECIPE = Path(evaluate.__file__).with_name("pretrain.toml")


@pytest.fixture(scope="module")
def examples():
    """(scene, item) of the two splits."""
    rng = np.random.default_rng(0)
    return {split: [example(rng, held_out=split) for _ in range(100)] for split in (False, True)}


def test_a_held_out_picture_depends_on_its_number_alone():
    (one, text), (same, same_text), (other, _) = (held_out(number) for number in (3, 3, 4))
    assert text == same_text
    assert (one == same).all()
    assert (one != other).any()


def test_training_has_no_caption_of_a_held_out_picture(examples):
    for split, some in examples.items():
        assert {is_held_out(scene) for scene, _ in some} == {split}
    first, second = ({item.caption for _, item in some} for some in examples.values())
    assert not first & second


def test_a_phrase_fits_one_object_and_the_box_is_its_own(examples):
    some = examples[True]
    for scene, item in some:
        (found,) = matches(scene, item.text)
        assert found.box == item.box
    related = [item for _, item in some if any(relation in item.text for relation in RELATIONS)]
    assert len(related) > 0.1 * len(some)


def test_a_box_encloses_the_pixels_of_its_object(examples):
    for each in (each for scene, _ in examples[True][:30] for each in scene):
        with_it, without = (draw(scene, np.random.default_rng(1)).astype(int) for scene in ((each,), ()))
        seen = (abs(with_it - without) > 40).any(axis=2)
        rows, columns = (np.flatnonzero(seen.any(axis=axis)) for axis in (1, 0))
        found = (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)
        wanted = (each.top, each.top + each.side, each.left, each.left + each.side)
        assert np.abs(np.subtract(found, wanted)).max() <= 1


def test_objects_of_a_picture_differ_and_do_not_overlap(examples):
    for scene, _ in examples[True]:
        taken = np.zeros((SIDE, SIDE), int)
        for each in scene:
            taken[each.top : each.top + each.side, each.left : each.left + each.side] += 1
        assert taken.max() == 1
        assert len({each[:3] for each in scene}) == len(scene) in (2, 3, 4)


def test_questions_and_their_answers(examples):
    for scene, item in examples[False]:
        (answer,) = item.answers
        assert answer in ANSWERS[item.extra["kind"]]
        words = item.question.split()
        if item.question.startswith("is there"):
            there = any({each.color, each.shape} == {*words[-2:]} for each in scene)
            assert answer == ("yes" if there else "no")
        if item.question.startswith("what color"):
            (found,) = matches(scene, " ".join(words[words.index("the") :]))
            assert answer == found.color


def test_a_color_or_shape_that_is_nowhere(examples):
    rng = np.random.default_rng(0)
    for scene, _ in examples[False]:
        color, shape = absent(scene, rng).split()[-2:]
        assert all(each.color != color for each in scene) or all(each.shape != shape for each in scene)
    for source, upright in ((Comparisons, 0.5), (Relations, 0.875)):
        data = source(mf.MPlugConfig.preset("tiny"))
        items = [data.sample(0, rng).item for _ in range(300)]
        assert sum(item.extra["kind"] in ("count", "exists", "relation") for item in items) > 200
        asked = [str(item.question) for item in items if item.extra["kind"] == "relation"]
        assert np.mean([" of " not in each for each in asked]) == pytest.approx(upright, abs=0.15)


def test_the_vocabulary_has_every_word(examples):
    tokenizer = Tokenizer(vocabulary())
    for _, item in examples[False]:
        for text in (*item.caption, item.question, *item.answers, item.text):
            assert not tokenizer.unknown_words(text)
    assert vocabulary()[344:346] == ["[unused339]", "[unused340]"]
    assert vocabulary()[681] == "[unused676]"


def test_pictures_are_written_as_files(tmp_path):
    written = write(tmp_path, 5)
    items = read_items(tmp_path / "test.jsonl")
    assert [item.caption for item in items] == [item.caption for item in written]
    assert len({item.caption for item in items}) == 5
    from PIL import Image

    number = int(items[0].id)
    assert (np.asarray(Image.open(items[0].image)) == held_out(number)[0]).all()


def test_a_caption_says_what_is_where():
    picture, item = held_out(0)
    assert picture.shape == (SIDE, SIDE, 3)
    assert caption(example(np.random.default_rng([1, 0]), held_out=True)[0]) == item.caption[0]


def test_the_recipe_trains_all_tasks(tmp_path):
    small = [f"sources.{number}.batch_size=3" for number in range(3)]
    recipe = load_recipe(RECIPE, [f"out={tmp_path}", "steps=1", "workers=0", "sources_per_step=all", *small])
    folder = mf.Trainer(recipe, note=lambda line: None).train()
    (line,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert {name for name in line if name.startswith("loss/")} == {f"loss/{task}" for task in evaluate.TASKS}
    assert line["loss/grounding"] == pytest.approx(math.log(337), abs=1.0)  # not weighted
    assert (folder / "vocab.txt").read_text() == (evaluate.PACKAGED / "vocab.txt").read_text()
    assert (folder / "vocab.txt").read_text().split() == vocabulary()


def test_the_packaged_model_reads_bundled_pictures():
    assert sum(file.stat().st_size for file in evaluate.PACKAGED.iterdir()) <= 6_000_000
    model = from_pretrained(evaluate.PACKAGED, tasks=evaluate.TASKS)
    items = read_items(RECIPE.parent / "pictures" / "test.jsonl")
    assert [item.caption for item in items] == [held_out(int(item.id))[1].caption for item in items]
    tokenizer = Tokenizer.from_vocab(evaluate.PACKAGED / "vocab.txt", vocab_size=model.config.text.vocab_size)
    result = evaluate.score(model, tokenizer, items)
    assert min(result["captions"], result["boxes"], result["picture_of_caption_features"]) >= 0.75

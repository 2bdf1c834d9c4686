"""The recipe runs, and the included tiny model captions clips that it never saw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mplug2_fast as mf
from examples.moving_shapes import evaluate
from examples.moving_shapes.data import Logs, MovingShapes
from examples.moving_shapes.generator import (
    ACTIONS,
    OPPOSITE,
    PLACES,
    QUESTION_KINDS,
    answer,
    caption,
    clip_frames,
    held_out_scenes,
    vocabulary,
)
from examples.moving_shapes.grow import grow
from examples.moving_shapes.report import ROWS, table
from mplug2_fast.text import Tokenizer
from mplug2_fast.training import Sample, load_recipe
from mplug2_fast.training.data import video_of

CLIPS = Path(evaluate.__file__).parent / "clips"
RECIPE = Path(evaluate.__file__).with_name("recipe.toml")
TASKS = RECIPE.with_name("tasks.toml")


def as_video(frames):
    """Frames `(B, T, height, width, 3)`, uint8, as the model sees them."""
    return video_of([Sample(None, each) for each in frames], frames.shape[2])


def trainer(folder, *changes):
    short = ["steps=2", "sources.0.batch_size=4", "workers=0", f"out={folder}"]
    return mf.Trainer(load_recipe(RECIPE, [*short, *changes]), note=lambda line: None)


@pytest.fixture(scope="module")
def tiny():
    return evaluate.load(evaluate.PACKAGED)


@pytest.fixture(scope="module")
def bundled(tiny):
    described = json.loads((CLIPS / "clips.json").read_text())
    return described, evaluate.load_clips([CLIPS / name for name in described], tiny[0].config)


@pytest.fixture(scope="module")
def embeds(tiny, bundled):
    return tiny[0].encode_video(bundled[1]).detach()


def test_samples_depend_on_their_random_numbers(tiny):
    model, tokenizer = tiny[0], Tokenizer(vocabulary())
    data = MovingShapes(model.config)
    one, same, other = (data.sample(0, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (one.item, one.frames.shape) == (same.item, (4, 32, 32, 3))
    assert (one.frames == same.frames).all()
    assert (one.frames != other.frames).any()
    told = Logs(model.config).sample(0, np.random.default_rng(1)).item
    events, _, place = told.text.partition(" what came ")
    assert told.answers == {events.split(" then ")[PLACES.index(place)]: 1.0}
    for text in (*one.item.caption, one.item.question, *one.item.answers, one.item.text, told.text, *told.answers):
        assert not tokenizer.unknown_words(text)


def test_frames_become_pixels_as_load_video_makes_them(tmp_path):
    scenes = held_out_scenes(2)
    paths = evaluate.make_clips(scenes, tmp_path)
    loaded = torch.stack([mf.load_video(path, num_frames=4, image_size=32) for path in paths])
    drawn = np.stack([clip_frames(scenes[i])[[1, 5, 9, 13]][:, ::4, ::4] for i in range(2)])
    assert (loaded - as_video(np.ascontiguousarray(drawn))).abs().mean() < 0.1


def test_training_changes_the_weights(tmp_path):
    run = trainer(tmp_path)
    before = {name: value.clone() for name, value in run.model.official_parameters().items()}
    assert not any(value.any() for name, value in before.items() if ".up_proj." in name)
    run.train()
    after = run.model.official_parameters()
    assert sum(not torch.equal(before[name], value) for name, value in after.items()) > 0.9 * len(after)


def losses_of_all_tasks(checkpoint, folder, *changes):
    """The losses of each step of a short run of `tasks.toml`."""
    short = [f"model.checkpoint='{checkpoint}'", "sources_per_step=all", "workers=0", f"out={folder}", *changes]
    short += [f"sources.{number}.batch_size={size}" for number, size in enumerate((4, 8, 4))]
    short += ["tensorboard=false", "schedule.warmup_steps=2", "schedule.kind=constant"]
    mf.Trainer(load_recipe(TASKS, short), note=lambda line: None).train()
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_model_keeps_its_words_when_its_vocabulary_grows(tmp_path):
    source = trainer(tmp_path / "run").train()
    grow(source, tmp_path / "start")
    words = (source / "vocab.txt").read_text().split()
    assert {vocabulary()[number] == word for number, word in enumerate(words) if word[:7] != "[unused"} == {True}
    small, large = (mf.from_pretrained(folder, task="question_answering") for folder in (source, tmp_path / "start"))
    ids, _ = Tokenizer(words).encode(["what color is the shape"], end=True)
    for one, other in zip(small.encode_text(ids, ids > 0), large.encode_text(ids, ids > 0), strict=True):
        torch.testing.assert_close(one, other)


def test_all_tasks_learn_together(tmp_path):
    grow(trainer(tmp_path / "first").train(), tmp_path / "start")
    lines = losses_of_all_tasks(tmp_path / "start", tmp_path / "run", "steps=12")
    parts = lines[:4], lines[-4:]
    first, last = ({name: sum(line[name] for line in part) / 4 for name in lines[0]} for part in parts)
    names = ("loss", "loss/captioning", "loss/grounding", "loss/text_generation")
    assert [name for name in names if last[name] >= first[name]] == []


def test_the_tiny_model_knows_all_tasks(tmp_path):
    still = "optimizer.learning_rate=0.0", "optimizer.vision_learning_rate=0.0"
    lines = losses_of_all_tasks(evaluate.PACKAGED, tmp_path / "run", "steps=2", *still)
    for name in ("captioning", "question_answering", "action", "text_generation", "retrieval"):
        assert max(line[f"loss/{name}"] for line in lines) < 1
    assert max(line["loss/grounding"] for line in lines) < 3.5  # of 337 places


def test_the_ablation_does_not_see_the_order_of_frames(tmp_path):
    frames = [MovingShapes(mf.MPlug2Config.preset("tiny")).sample(0, np.random.default_rng(i)).frames for i in range(4)]
    video = as_video(np.stack(frames))
    for sees, changes in ((True, []), (False, ["model.freeze=['*lmhra*']"])):
        run = trainer(tmp_path / str(sees), *changes)
        run.train()
        with torch.no_grad():
            first, last = (run.model.eval().encode_video(v).view(4, -1, 128)[:, 1:] for v in (video, video.flip(2)))
            last = last.view(4, 4, 16, 128).flip(1).flatten(1, 2)
            assert ((first - last).abs().max() > 1e-4) == sees


def test_scores():
    scenes = held_out_scenes(30, 300)
    n = len(scenes)
    right = [caption(scenes, i) for i in range(n)]
    answers = {kind: [answer(scenes, i, kind) for i in range(n)] for kind in QUESTION_KINDS}
    assert set(evaluate.score(scenes, right, answers).values()) == {n, 1.0}
    backwards = scenes.backwards()
    result = evaluate.score(scenes, [caption(backwards, i) for i in range(n)], {**answers, "color": ["gray"] * n})
    still = np.mean([OPPOSITE[a] == a for a in scenes.action])
    assert result["captions"] == pytest.approx(still)
    assert (result["axis"], result["direction"]) == (1, 0)
    assert (result["answers_color"], result["answers"]) == (0, 0.75)
    assert len(ACTIONS) == 7


def test_the_checkpoint_that_ships_is_small_and_has_all_words(tiny):
    assert sum(file.stat().st_size for file in evaluate.PACKAGED.iterdir()) <= 6_000_000
    words = (evaluate.PACKAGED / "vocab.txt").read_text().split()
    assert words == vocabulary()
    preset = mf.MPlug2Config.preset("tiny").replace(vocab_size=len(words))
    assert (tiny[0].config.vision, tiny[0].config.text) == (preset.vision, preset.text)


def test_bundled_clips_are_the_held_out_scenes_that_they_are_said_to_be(bundled):
    described, videos = bundled
    for clip, video in zip(described.values(), videos, strict=True):
        scene = held_out_scenes(1, clip["scene"])
        assert clip["caption"] == caption(scene, 0)
        drawn = as_video(np.ascontiguousarray(clip_frames(scene)[None, [1, 5, 9, 13]][:, :, ::4, ::4]))[0]
        assert (video - drawn).abs().mean() < 0.1


def test_the_tiny_model_captions_bundled_clips(tiny, bundled, embeds):
    described, _ = bundled
    assert len(described) >= 4
    assert evaluate.generate_captions(*tiny, embeds) == [clip["caption"] for clip in described.values()]


def test_the_tiny_model_answers_questions_about_bundled_clips(tiny, bundled, embeds):
    described, _ = bundled
    asked = [(i, *pair) for i, clip in enumerate(described.values()) for pair in clip["questions"].items()]
    which, ways, right = zip(*asked, strict=True)
    assert evaluate.generate_answers(*tiny, embeds[list(which)], list(ways)) == list(right)


def test_bundled_clips_played_backwards_move_the_other_way(tiny, bundled):
    """The model sees the order of the frames. Only this shows the direction."""
    described, videos = bundled
    scenes = [held_out_scenes(1, clip["scene"]).backwards() for clip in described.values()]
    embeds = tiny[0].encode_video(videos.flip(2)).detach()
    assert evaluate.generate_captions(*tiny, embeds) == [caption(scene, 0) for scene in scenes]


def test_held_out_scores(tiny):
    scenes = held_out_scenes(60, evaluate.FIRST_HELD_OUT)
    captions = evaluate.generate_captions(*tiny, evaluate.encoded(tiny[0], scenes))
    assert sum(captions[i] == caption(scenes, i) for i in range(60)) >= 54


def test_the_page_shows_the_results_of_all_tasks():
    page = Path(__file__).parents[2] / "docs/tasks.md"
    assert table() in page.read_text(encoding="utf-8")


def test_the_stored_results_meet_the_bars():
    results = json.loads((Path(evaluate.__file__).parent / "results.json").read_text())
    tiny = results["tiny"]
    assert tiny["clips"] >= 500
    assert [key for key, row in ROWS.items() if row.goal is not None and 100 * tiny[key] < row.goal] == []
    for way in ("caption_of_clip", "clip_of_caption"):
        assert tiny[f"{way}_reranked"] >= tiny[f"{way}_features"]
    assert min(results["recipe"]["captions"], results["recipe"]["answers"]) >= 0.995
    ablation = results["no_local_temporal"]
    assert ablation["axis"] > 0.9
    assert abs(ablation["direction"] - 0.5) < 0.08

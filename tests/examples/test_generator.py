"""The moving shapes generator: deterministic, true to its captions, and silent about direction in single frames."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from examples.moving_shapes.generator import (
    ACTIONS,
    COLORS,
    OPPOSITE,
    QUESTION_KINDS,
    SEEN_FRAMES,
    SHAPES,
    all_sentences,
    answer,
    boxes,
    caption,
    clip_frames,
    held_out_scenes,
    log,
    phrases,
    questions,
    render,
    sample_scenes,
    training_frames,
    training_rng,
    vocabulary,
    write_clip,
)
from examples.moving_shapes.generator.render import CLIP_SIZE

PIXELS = np.arange(32) * CLIP_SIZE // 32


def sampled(scenes):
    return render(scenes, SEEN_FRAMES, PIXELS, CLIP_SIZE)


def shape_masks(scenes):
    """Where the shape is in each seen frame, (n, 4, 32, 32): pixels that differ from the bare background."""
    bare = dataclasses.replace(scenes, radius=np.zeros_like(scenes.radius))
    return np.abs(sampled(scenes) - sampled(bare)).max(-1) > 0.1


def test_same_step_same_frames():
    first, second = (training_frames(sample_scenes(rng, 8), rng) for rng in (training_rng(3, 5), training_rng(3, 5)))
    other_rng = training_rng(3, 6)
    np.testing.assert_array_equal(first, second)
    assert (training_frames(sample_scenes(other_rng, 8), other_rng) != first).any()


def test_held_out_scenes_do_not_depend_on_how_many_are_asked_for():
    one, many = held_out_scenes(1, 12), held_out_scenes(5, 10)
    np.testing.assert_array_equal(sampled(one), sampled(many[2]))


def test_a_batch_is_its_scenes():
    scenes = held_out_scenes(6)
    np.testing.assert_allclose(sampled(scenes)[4], sampled(scenes[4])[0], atol=1e-6)


def test_opposite_actions_show_the_same_frames_in_opposite_orders():
    scenes = held_out_scenes(40)
    backwards = scenes.backwards()
    np.testing.assert_array_equal(backwards.action, OPPOSITE[scenes.action])
    np.testing.assert_allclose(sampled(backwards), sampled(scenes)[:, ::-1], atol=1e-6)


def test_opposite_actions_are_drawn_from_the_same_positions_and_sizes():
    scenes = sample_scenes(np.random.default_rng(0), 20_000)
    for action in (0, 2, 4):
        one, other = scenes.action == action, scenes.action == OPPOSITE[action]
        assert one.sum() > 2500
        for values in (scenes.center[:, 0], scenes.center[:, 1], scenes.radius, np.abs(scenes.velocity).sum(1)):
            np.testing.assert_allclose(values[one].mean(), values[other].mean(), atol=0.005)
            np.testing.assert_allclose(values[one].std(), values[other].std(), atol=0.005)


def test_the_action_is_what_the_pixels_do():
    scenes = held_out_scenes(60, 200)
    masks = shape_masks(scenes)
    area = masks.sum((2, 3))
    x = (masks.sum(2) * np.arange(32)).sum(-1) / area
    y = (masks.sum(3) * np.arange(32)).sum(-1) / area
    measured = {
        "moves left": x[:, 0] - x[:, -1],
        "moves right": x[:, -1] - x[:, 0],
        "moves up": y[:, 0] - y[:, -1],
        "moves down": y[:, -1] - y[:, 0],
        "grows": (area[:, -1] - area[:, 0]) / 8,
        "shrinks": (area[:, 0] - area[:, -1]) / 8,
        "stays still": np.full(len(scenes), 3.0),
    }
    values = np.stack([measured[action] for action in ACTIONS], -1)
    assert set(scenes.action) == set(range(len(ACTIONS)))
    np.testing.assert_array_equal(values.argmax(-1), scenes.action)


def test_every_shape_stays_in_view_and_stands_out():
    scenes = sample_scenes(np.random.default_rng(1), 200)
    masks = shape_masks(scenes)
    assert masks.any((2, 3)).all()
    assert masks.sum((2, 3)).mean() > 40
    lost = masks[..., 0, :].sum() + masks[..., -1, :].sum() + masks[..., 0].sum() + masks[..., -1].sum()
    assert lost < 0.01 * masks.sum()


def test_shapes_differ_from_one_another():
    scene = held_out_scenes(1, 39)
    masks = [shape_masks(dataclasses.replace(scene, shape=np.array([k])))[0, 0] for k in range(len(SHAPES))]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert (one != other).sum() >= 0.15 * one.sum()


def test_an_encoded_clip_looks_as_it_was_drawn(tmp_path):
    av = pytest.importorskip("av")
    scenes = held_out_scenes(6)
    for i in range(len(scenes)):
        path = tmp_path / f"{i}.mp4"
        frames = clip_frames(scenes[i])
        write_clip(path, frames)
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert decoded.shape == frames.shape == (16, 128, 128, 3)
        assert np.abs(decoded.astype(int) - frames).mean() < 5
        seen = decoded[list(SEEN_FRAMES)][:, PIXELS][:, :, PIXELS]
        assert np.abs(seen - 255 * sampled(scenes[i])[0]).mean() < 5


def test_the_model_is_given_the_frames_that_training_draws():
    video = pytest.importorskip("mplug2_fast.video")
    assert tuple(video.frame_indices(16, 4)) == SEEN_FRAMES


def test_augmentation_is_small():
    rng = np.random.default_rng(0)
    scenes = held_out_scenes(64)
    difference = training_frames(scenes, rng) - 255 * sampled(scenes)
    assert 2 < np.abs(difference).mean() < 12


@pytest.mark.parametrize(("number", "text"), [(22, "a red square moves left"), (29, "an orange diamond moves left")])
def test_captions(number, text):
    assert caption(held_out_scenes(1, number), 0) == text


def test_answers():
    scenes = held_out_scenes(1, 22)
    assert [answer(scenes, 0, kind) for kind in QUESTION_KINDS] == ["red", "square", "moves left", "left"]
    still = held_out_scenes(1, 39)
    assert [answer(still, 0, kind) for kind in QUESTION_KINDS] == ["purple", "star", "stays still", "nowhere"]
    assert "what color is the square" in questions(scenes, 0, "color")
    assert questions(scenes, 0, "action")[0] == "what does the shape do"


def test_phrases_and_logs():
    scenes = held_out_scenes(1, 22)
    assert phrases(scenes, 0) == ["the shape", "the square", "the red shape", "the red square"]
    captions = [caption(held_out_scenes(1, number), 0) for number in (22, 29, 39)]
    assert log(captions, "second") == (
        "a red square moves left then an orange diamond moves left then a purple star stays still what came second"
    )


def test_a_box_encloses_its_shape():
    scenes = held_out_scenes(60)
    for seen in (0, -1):
        masks = shape_masks(scenes)[:, seen]
        for mask, box in zip(masks, boxes(scenes, SEEN_FRAMES[seen]), strict=True):
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            low, high = (box[:2] - box[2:] / 2) * 32, (box[:2] + box[2:] / 2) * 32
            assert np.abs(low - (columns[0], rows[0])).max() < 2.5  # tips are thinner than a pixel
            assert np.abs(high - (columns[-1] + 1, rows[-1] + 1)).max() < 2.5


def test_the_vocabulary_covers_everything_that_is_said():
    text = pytest.importorskip("mplug2_fast.text")
    tokenizer = text.Tokenizer(vocabulary())
    sentences = list(all_sentences())
    assert len(sentences) > len(COLORS) * len(SHAPES) * len(ACTIONS)
    for sentence in sentences:
        ids, _ = tokenizer.encode([sentence], end=True)
        assert ids.shape[1] == len(sentence.split()) + 2  # one token a word
        assert tokenizer.decode(ids[0]) == sentence == text.clean_caption(sentence) == text.clean_question(sentence)


def test_the_vocabulary_keeps_the_special_ids_and_spells_other_words():
    text = pytest.importorskip("mplug2_fast.text")
    words = vocabulary()
    assert len(words) == len(set(words)) == 682
    assert {word[:7] for word in words[344:]} == {"[unused"}  # places of boxes
    assert [words[i] for i in (0, 1, 99, 100, 101, 102, 103)] == [
        "[PAD]", "[unused0]", "[unused98]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
    ]  # fmt: skip
    ids, _ = text.Tokenizer(words).encode(["zebra x9"], end=False)
    assert 100 not in ids

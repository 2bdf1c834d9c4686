"""Pixels, boxes and random changes of pictures, compared with what the official mPLUG code computed.

`official.npz` has the official results for random pictures, which follow from their seeds.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from mplug2_fast.images import GroundingAugment, ImageAugment, randaugment
from mplug2_fast.images.augment import flipped
from mplug2_fast.images.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Placement,
    in_square,
    normalise,
    normalise_in_square,
    resize,
)

OFFICIAL = np.load(Path(__file__).parent / "official.npz")
SIZE = 56
# Picture, corners and size in pixels of the official grounding sample.
BOX = (20, 5, 31, 24)
WIDTH, HEIGHT = 90, 40


def random_picture(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


PICTURE = random_picture(2308, 50, 83)
GROUNDING_PICTURE = random_picture(2704, HEIGHT, WIDTH)


def test_pixels_are_the_official_ones():
    pixels = normalise(torch.tensor(resize(PICTURE, SIZE, SIZE, bicubic=True))[None])[:, 0]
    np.testing.assert_allclose(pixels.numpy(), OFFICIAL["pixels"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [("grounding_pixels", IMAGENET_MEAN, IMAGENET_STD), ("grounding_train_pixels", CLIP_MEAN, CLIP_STD)],
)
def test_grounding_pixels_are_the_official_ones(name: str, mean: tuple[float, ...], std: tuple[float, ...]):
    place = Placement.centred(WIDTH, HEIGHT, SIZE)
    frames = torch.from_numpy(in_square(GROUNDING_PICTURE, SIZE))[None]
    pixels = normalise_in_square(frames, place, mean, std)[:, 0]
    np.testing.assert_allclose(pixels.numpy(), OFFICIAL[name], rtol=0, atol=1e-6)


def test_boxes_move_to_the_square_and_back():
    x, y, w, h = BOX
    place = Placement.centred(WIDTH, HEIGHT, SIZE)
    box = place.box_in_square(((x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT), WIDTH, HEIGHT)
    np.testing.assert_allclose(box, OFFICIAL["picture_target"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(place.corners_in_picture(box, WIDTH, HEIGHT), (x, y, x + w, y + h), atol=1e-9)
    assert place.corners_in_picture((0.5, 0.5, 2.0, 2.0), WIDTH, HEIGHT) == (0, 0, WIDTH, HEIGHT)


def test_a_flip_mirrors_the_box_and_exchanges_left_and_right():
    x, y, w, h = BOX
    pixels, phrase, corners = flipped(
        GROUNDING_PICTURE, "the right hand of the leftmost man", np.array([x, y, x + w, y + h])
    )
    assert phrase == "the left hand of the rightmost man"
    assert corners.tolist() == OFFICIAL["flipped_box"].tolist()
    assert (pixels[:, ::-1] == GROUNDING_PICTURE).all()


def test_operations_without_a_warp_are_the_official_ones():
    results = {
        "equalize": (randaugment.equalize(PICTURE), 4231183298),
        "brightness": (randaugment.brightness(PICTURE, 1.36), 3294907897),
        "sharpness": (randaugment.sharpness(PICTURE, 1.36), 1912306609),
        "translate_x": (randaugment.translate_x(PICTURE, 7.0), 3603294305),
        "translate_y": (randaugment.translate_y(PICTURE, 7.0), 3652028795),
    }
    assert {name: zlib.crc32(pixels.tobytes()) for name, (pixels, _) in results.items()} == {
        name: checksum for name, (_, checksum) in results.items()
    }
    dull = PICTURE // 4 + 10
    assert randaugment.auto_contrast(dull).min() == 0
    assert randaugment.auto_contrast(dull).max() == 255
    assert (randaugment.equalize(np.full_like(PICTURE, 7)) == 7).all()


@pytest.mark.parametrize(
    ("name", "operation", "argument"),
    [
        ("ShearX", randaugment.shear_x, 0.21),
        ("ShearY", randaugment.shear_y, 0.21),
        ("Rotate", randaugment.rotate, -21.0),
    ],
)
def test_warps_differ_by_at_most_one_at_a_rounding(name, operation, argument):
    difference = np.abs(operation(PICTURE, argument).astype(int) - OFFICIAL[name])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_sharpness_wraps_unless_it_clips():
    picture = np.zeros((5, 5, 3), np.uint8)
    picture[2, 2] = 250
    assert randaugment.sharpness(picture, 1.36)[2, 2, 0] == int(96 + 1.36 * (250 - 96)) - 256
    assert randaugment.sharpness(picture, 1.36, clip=True)[2, 2, 0] == 255


def test_the_seed_decides_random_changes():
    def changed(seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [ImageAugment()(PICTURE, SIZE, rng) for _ in range(5)]

    first, again, other = changed(0), changed(0), changed(1)
    assert all(picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8 for picture in first)
    assert all((one == two).all() for one, two in zip(first, again, strict=True))
    assert not all((one == two).all() for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (200, 2)])
def test_odd_pictures_are_augmented(shape: tuple[int, int]):
    picture = random_picture(0, *shape)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        assert ImageAugment()(picture, 32, rng).shape == (32, 32, 3)
        assert GroundingAugment()(picture, "a dog", (0.5, 0.5, 1, 1), 32, rng).pixels.shape == (32, 32, 3)


@pytest.mark.parametrize("phrase", ["the LEFT dog", "a dog"])
def test_the_box_follows_its_object(phrase: str):
    """A bright rectangle marks the box. After the changes, it fills the box."""
    picture = np.zeros((60, 100, 3), np.uint8)
    picture[20:40, 10:50] = 200
    augment = GroundingAugment(correct_crop=True)
    phrases = set()
    for seed in range(40):
        sample = augment(picture, phrase, (0.3, 0.5, 0.4, 1 / 3), 112, np.random.default_rng(seed))
        phrases.add(sample.phrase)
        x, y, w, h = (112 * part for part in sample.box)
        rows, columns = np.nonzero(sample.pixels[..., 0] > 40)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(found, [x - w / 2, y - h / 2, x + w / 2, y + h / 2], atol=2)
    assert phrases == ({"the left dog", "the right dog"} if "LEFT" in phrase else {"a dog"})


def test_the_official_crop_confuses_the_axes():
    """The object is at the bottom left: below the top of most crops, and left of many."""
    picture = np.zeros((100, 100, 3), np.uint8)
    box = (0.04, 0.9, 0.06, 0.1)
    empty = {
        correct: sum(
            min(GroundingAugment(correct)(picture, "a dog", box, 336, np.random.default_rng(seed)).box[2:]) <= 0
            for seed in range(60)
        )
        for correct in (False, True)
    }
    assert empty[False] > empty[True] == 0

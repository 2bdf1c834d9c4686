"""Training data that needs no files."""

from __future__ import annotations

from typing import Any

import numpy as np

from mplug2_fast.datasets import Item
from mplug2_fast.errors import VideoError
from mplug2_fast.training import Sample

WORDS = ("red", "green", "blue", "white")


class Noise:
    """Eleven clips of noise, each with two captions, a question and two answers."""

    unreadable: frozenset[int] = frozenset()

    def __init__(self, config: Any) -> None:
        self._size, self._frames = config.vision.image_size, config.vision.num_frames

    def __len__(self) -> int:
        return 11

    @property
    def items(self) -> list[Item]:
        return [self._item(index) for index in range(len(self))]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        if index in self.unreadable:
            raise VideoError(f"{index}.mp4: damaged")
        frames = rng.integers(0, 256, (self._frames, self._size, self._size, 3), dtype=np.uint8)
        return Sample(self._item(index), frames + np.uint8(index))

    def _item(self, index: int) -> Item:
        word, other = WORDS[index % 4], WORDS[index // 4]
        captions = (f"a {word} square moves {'left' if index % 2 else 'left and right'}", f"a {other} circle")
        question, answers = f"what color is the {word} shape", {word: 1.0, other: 0.5}
        return Item(str(index), caption=captions, question=question, answers=answers)

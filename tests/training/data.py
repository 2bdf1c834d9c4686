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

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        if index in self.unreadable:
            raise VideoError(f"{index}.mp4: damaged")
        word, other = WORDS[index % 4], WORDS[index // 4]
        captions = (f"a {word} square moves {'left' if index % 2 else 'left and right'}", f"a {other} circle")
        item = Item(
            str(index), caption=captions, question=f"what color is the {word} shape", answers={word: 1.0, other: 0.5}
        )
        frames = rng.integers(0, 256, (self._frames, self._size, self._size, 3), dtype=np.uint8)
        return Sample(item, frames + np.uint8(index))

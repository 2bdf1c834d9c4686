"""Many small files for bulk runs: different videos, and broken files."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from tests.video.clips import write_video
from tests.video.test_broken_files import BROKEN

FORMATS = (("mp4", "libx264"), ("avi", "mpeg4"), ("mkv", "mjpeg"), ("mov", "mpeg4"), ("gif", "gif"), ("png", "png"))

KINDS = [kind for kind in BROKEN if kind not in ("directory", "name with a null", "text named txt")]
"""Kinds of broken files: not the folder and the list, which stand for what is in them, nor the name that no command can
be given."""


def write_clip(path: Path, codec: str, seed: int, frames: int = 6) -> Path:
    """A video of coloured blocks, different for each seed."""
    noise = np.random.default_rng(seed)
    blocks = noise.integers(0, 256, (frames, 4, 6, 3), dtype=np.uint8)
    return write_video(path, codec, list(blocks.repeat(8, axis=1).repeat(8, axis=2)))


def mixed_files(folder: Path, good: int, broken: int) -> tuple[list[str], set[str]]:
    """(paths in a fixed order, the broken ones among them), in several formats and with all kinds of damage."""
    paths = []
    for number, (extension, codec) in zip(range(good), itertools.cycle(FORMATS), strict=False):
        frames = 1 if codec == "png" else 6
        paths.append(str(write_clip(folder / f"clip {number}.{extension}", codec, number, frames)))
    bad = []
    for number, kind in zip(range(broken), itertools.cycle(KINDS), strict=False):
        place = folder / f"broken {number}"
        place.mkdir()
        bad.append(str(BROKEN[kind][0](place)))
    every = good // max(broken, 1) + 1
    for number, path in enumerate(bad):
        paths.insert(number * every, path)
    return paths, set(bad)

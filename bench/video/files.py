"""Video files to measure with: those that ship, and others that are written outside the clock."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import weakref
from pathlib import Path

from bench.bulk import write_clips

BUNDLED = Path(__file__).resolve().parents[2] / "examples/moving_shapes/clips"


def missing() -> str | None:
    """What reading and writing files lacks here, and the remedy; None where it lacks nothing."""
    return None if importlib.util.find_spec("av") else "PyAV is not installed: pip install av"


class Clips:
    """Clips of moving shapes, in a folder that goes when this object does.

    Attributes:
        paths: the files, all of one size.
    """

    def __init__(self, count: int, frames: int, size: int) -> None:
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.paths = write_clips(Path(folder), count, size, frames)


class BundledClips:
    """The clips that ship: 16 frames of 128 pixels each."""

    def __init__(self) -> None:
        self.paths = sorted(map(str, BUNDLED.glob("*.mp4")))

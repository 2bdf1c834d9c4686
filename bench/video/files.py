"""Video files to measure with: the bundled ones, and others written outside the clock."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import weakref
from pathlib import Path

from bench.bulk import write_clips

BUNDLED = Path(__file__).resolve().parents[2] / "examples/moving_shapes/clips"


def missing() -> str | None:
    """Why files cannot be read and written here; None if they can."""
    return None if importlib.util.find_spec("av") else "PyAV is not installed: pip install av"


class Clips:
    """Clips of moving shapes, in a folder that is deleted with this object.

    Attributes:
        paths: the files, all of one size.
    """

    def __init__(self, count: int, frames: int, size: int) -> None:
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.paths = write_clips(Path(folder), count, size, frames)


class BundledClips:
    """The bundled clips: 16 frames of 128 pixels each."""

    def __init__(self) -> None:
        self.paths = sorted(map(str, BUNDLED.glob("*.mp4")))

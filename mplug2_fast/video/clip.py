"""What loaders of many files take and give."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from torch import Tensor

from mplug2_fast.errors import VideoError

Source = str | os.PathLike[str] | bytes


def check_source(source: Source) -> Source:
    if not isinstance(source, (str, bytes, os.PathLike)):
        raise TypeError(f"a source is a path or the bytes of a file, not {type(source).__name__}")
    return source


def shown(source: Source) -> str:
    """A source as error messages call it."""
    return f"{len(source):,} bytes in memory" if isinstance(source, bytes) else os.fsdecode(source)


@dataclass(frozen=True)
class Clip:
    """Frames of a file, or the reason why there are none.

    `frames` is (3, T, image_size, image_size), normalised, of the dtype that was asked for, or (T, height, width, 3),
    uint8; None if there is an `error`. `indices` are the frames' numbers in the video. `window` is the number of the
    window in the file, and `last` tells whether it is the last that comes of the file: always, unless windows were
    asked for. After an error nothing comes of the file; windows before it may have. An error is `transient` if another
    try may succeed: the decoder was killed, crashed or took too long. `seconds` is the time that decoding took, and
    `passed_by` is why the backend that was asked for left the file to PyAV.
    """

    index: int
    source: Source
    frames: Tensor | None = None
    error: VideoError | None = None
    indices: list[int] = field(default_factory=list)
    backend: str | None = None
    seconds: float = 0.0
    window: int = 0
    last: bool = True
    passed_by: str | None = None
    transient: bool = False

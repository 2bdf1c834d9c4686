"""The input and the output of loaders of many files."""

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
    """A source as error messages show it."""
    return f"{len(source):,} bytes in memory" if isinstance(source, bytes) else os.fsdecode(source)


@dataclass(frozen=True)
class Clip:
    """Frames of a file, or the reason why there are none.

    `frames` is (3, T, image_size, image_size), normalised, of the requested dtype; or (T, height, width, 3), uint8;
    or None if there is an `error`. `indices` are the frames' numbers in the video. `window` is the number of the
    window in the file. `last` is True for the last clip of the file; without windows, a file has one clip. An error
    ends a file, but windows may come before it. An error is `transient` if another try may succeed: the decoder was
    killed, crashed or took too long. `seconds` is the decoding time. `passed_by` is the reason why PyAV decoded the
    file instead of the requested backend. `size` is the width and height of the file's frames, upright; None if it is
    not known.
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
    size: tuple[int, int] | None = None

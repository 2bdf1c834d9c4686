"""Clips of a file: one clip of frames from the whole video, or a series of windows.

This module does not need torch, so that processes which only decode start quickly and stay small.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from mplug2_fast.video.backends import stream_frames
from mplug2_fast.video.indices import frame_indices
from mplug2_fast.video.limits import Guard, Limits


@dataclass(frozen=True)
class Windows:
    """Windows of `length` consecutive frames, one every `stride` frames, over a whole video.

    Windows begin at frame 0, `stride`, 2·`stride`, ... as long as each contains a frame that no earlier window has. If
    the video ends within the last window, its last frame is repeated.
    """

    length: int = 16
    stride: int = 16

    def __post_init__(self) -> None:
        for name in ("length", "stride"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} of the windows must be a whole number of frames, at least 1, not {value!r}")


@dataclass(frozen=True)
class ClipOptions:
    """Options of `clips_of`; without `image_size`, frames keep their size."""

    num_frames: int
    image_size: int | None
    windows: Windows | None
    threads: int
    backend: str
    limits: Limits


@dataclass(frozen=True)
class DecodedClip:
    """Frames of a file, arrays (height, width, 3), uint8, with their indices; `last` if no clip of the file follows."""

    frames: list[np.ndarray]
    indices: list[int]
    window: int
    last: bool
    backend: str


def clips_of(path: str | os.PathLike[str], options: ClipOptions) -> Iterator[DecodedClip]:
    """Decodes a file and yields one clip, or one for each window, as soon as its frames are decoded.

    Raises:
        VideoError: the file cannot be decoded. Windows before the damage may have come before.
    """
    decoding = {"threads": options.threads, "image_size": options.image_size, "guard": Guard(options.limits)}
    if options.windows is not None:
        for window in _windows(_all_frames(path, options.backend, decoding), options.windows):
            yield DecodedClip(*window, backend=options.backend)
        return
    indices: list[int] = []

    def choose(total: int) -> list[int]:
        indices[:] = frame_indices(total, options.num_frames)
        return indices

    frames = _chosen_frames(path, choose, options.backend, decoding)
    yield DecodedClip(frames, indices, window=0, last=True, backend=options.backend)


def _chosen_frames(
    path: str | os.PathLike[str], choose: Callable[[int], list[int]], backend: str, decoding: dict[str, Any]
) -> list[np.ndarray]:
    from mplug2_fast.video.decode import decode_frames, scan_packets

    if backend == "pyav":
        return decode_frames(path, choose, **decoding)
    name = os.fsdecode(path)
    scan = scan_packets(name, decoding["guard"])
    return list(stream_frames(backend, name, scan, choose(scan.shown), **decoding))


def _all_frames(path: str | os.PathLike[str], backend: str, decoding: dict[str, Any]) -> Iterator[np.ndarray]:
    from mplug2_fast.video.decode import iterate_frames, scan_packets

    if backend == "pyav":
        return iterate_frames(path, **decoding)
    name = os.fsdecode(path)
    scan = scan_packets(name, decoding["guard"])
    return stream_frames(backend, name, scan, list(range(scan.shown)), **decoding)


def _windows(frames: Iterator[np.ndarray], windows: Windows) -> Iterator[tuple[list[np.ndarray], list[int], int, bool]]:
    """Yields (frames, indices, number, whether it is the last) of each window. Keeps at most one window of frames.

    Only the next frame shows that a window is not the last, so each window is yielded after that frame is decoded.
    """
    length, gap = windows.length, max(windows.stride - windows.length, 0)
    held: deque[np.ndarray] = deque(islice(frames, length))
    number = 0
    while len(held) == length:
        following = next(islice(frames, gap, None), None)
        first = number * windows.stride
        yield list(held), list(range(first, first + length)), number, following is None
        if following is None:
            return
        for _ in range(min(windows.stride, length)):
            held.popleft()
        held.append(following)
        held.extend(islice(frames, length - len(held)))
        number += 1
    first, missing = number * windows.stride, length - len(held)
    indices = list(range(first, first + len(held)))
    yield [*held, *[held[-1]] * missing], indices + indices[-1:] * missing, number, True

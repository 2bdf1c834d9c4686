"""Clips of a file: one clip of frames from the whole video, or a series of windows.

This module does not need torch, so that processes which only decode start quickly and stay small.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from mplug2_fast.video.backends import stream_frames
from mplug2_fast.video.limits import Guard, Limits
from mplug2_fast.video.preparation import MPLUG2, Preparation

if TYPE_CHECKING:
    from mplug2_fast.video.seek import Scan


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
    windows: Windows | None = None
    threads: int | None = None
    backend: str = "pyav"
    limits: Limits = field(default_factory=Limits)
    preparation: Preparation = MPLUG2


@dataclass(frozen=True)
class DecodedClip:
    """Frames of a file, arrays (height, width, 3), uint8, with their indices; `last` if no clip of the file follows.

    `size` is the width and height of the file's frames, upright.
    """

    frames: list[np.ndarray]
    indices: list[int]
    window: int
    last: bool
    backend: str
    size: tuple[int, int]


def clips_of(path: str | os.PathLike[str], options: ClipOptions, guard: Guard | None = None) -> Iterator[DecodedClip]:
    """Decodes a file and yields one clip, or one for each window, as soon as its frames are decoded.

    Args:
        path: the file. options: see `ClipOptions`. guard: None makes one of the limits.

    Raises:
        VideoError: the file cannot be decoded. Windows before the damage may have come before.
    """
    name, guard, preparation = os.fsdecode(path), guard or Guard(options.limits), options.preparation
    count = options.num_frames if options.windows is None else options.windows.length
    pixels = preparation.still(name, count, guard)
    if pixels is not None:
        square = _square(pixels, options)
        size = pixels.shape[1], pixels.shape[0]
        indices = preparation.frames(1, count)
        yield DecodedClip([square] * len(indices), indices, window=0, last=True, backend="pillow", size=size)
        return

    from mplug2_fast.video.decode import scan_packets, usual_threads

    scan = scan_packets(name, guard)
    resampling = None if options.image_size is None else preparation.resampling(scan.shown)
    decoding = {
        "threads": usual_threads(options.threads),
        "image_size": None if resampling is None else options.image_size,
        "resampling": resampling or "nearest",
        "guard": guard,
    }

    def finish(frame: np.ndarray) -> np.ndarray:
        return _square(frame, options) if resampling is None else frame

    if options.windows is not None:
        frames = map(finish, _all_frames(name, scan, options.backend, decoding))
        for window in _windows(frames, options.windows):
            yield DecodedClip(*window, backend=options.backend, size=_size(scan))
        return
    indices = []

    def choose(total: int) -> list[int]:
        indices[:] = preparation.frames(total, count)
        return indices

    found = _chosen_frames(name, scan, choose, options.backend, decoding)
    squares = {id(frame): finish(frame) for frame in found}  # a frame that is repeated is squared once
    frames = [squares[id(frame)] for frame in found]
    yield DecodedClip(frames, indices, window=0, last=True, backend=options.backend, size=_size(scan))


def _square(pixels: np.ndarray, options: ClipOptions) -> np.ndarray:
    return pixels if options.image_size is None else options.preparation.square(pixels, options.image_size)


def _size(scan: Scan) -> tuple[int, int]:
    assert scan.size is not None  # a frame was decoded
    return scan.size


def _chosen_frames(
    name: str, scan: Scan, choose: Callable[[int], list[int]], backend: str, decoding: dict[str, Any]
) -> list[np.ndarray]:
    from mplug2_fast.video.decode import decode_scanned

    if backend == "pyav":
        return decode_scanned(name, scan, choose, **decoding)
    return list(stream_frames(backend, name, scan, choose(scan.shown), **decoding))


def _all_frames(name: str, scan: Scan, backend: str, decoding: dict[str, Any]) -> Iterator[np.ndarray]:
    from mplug2_fast.video.decode import iterate_scanned

    if backend == "pyav":
        return iterate_scanned(name, scan, **decoding)
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

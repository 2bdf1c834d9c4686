"""Reads frames of one video by their index, with any backend."""

from __future__ import annotations

import os
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mplug2_fast.errors import VideoError
from mplug2_fast.video.backends import check_backend, stream_frames
from mplug2_fast.video.clip import Source, shown
from mplug2_fast.video.limits import Guard, Limits
from mplug2_fast.video.preparation import Resampling

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from mplug2_fast.video.orientation import Orientation


class VideoReader:
    """The frames of a video file, or a still image, by index.

    Opening reads the packets once, without decoding or keeping them. Frames are decoded on request. The file itself is
    never held in memory.

    Args:
        source: a file that PyAV can decode, or the bytes of one.
        backend: "pyav", which decodes everything; "torchcodec", which refuses files that it does not decode reliably;
            None for "pyav".
        image_size: height and width of the frames, which are squashed right after decoding (see
            `mplug2_fast.ops.preprocess_frames`); None keeps their size.
        resampling: how frames are squashed: "nearest", or "bilinear" for libav's filter.
        threads: for decoding; None means torch's number.
        limits: on time, pixels, frames and memory; None means the defaults of `Limits`. The time limit starts again
            with each call, and after each frame that the caller receives.

    Raises:
        VideoError: the file cannot be read; one line, "<path>: <reason>".
        BackendError: the backend is unknown or not installed.
        ImportError: PyAV is not installed.
    """

    def __init__(
        self,
        source: Source,
        *,
        backend: str | None = None,
        image_size: int | None = None,
        resampling: Resampling = "nearest",
        threads: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        from mplug2_fast.video.decode import scan_packets, usual_threads

        self._image_size = image_size
        self._resampling: Resampling = resampling
        self._guard = Guard(limits)
        self._threads = usual_threads(threads)
        self.backend = check_backend(backend)
        if isinstance(source, bytes):
            descriptor = os.memfd_create("video")
            self.close = weakref.finalize(self, os.close, descriptor)
            with open(descriptor, "wb", closefd=False) as file:
                file.write(source)
            self._name, self._shown = f"/proc/self/fd/{descriptor}", shown(source)
        else:
            self.close = weakref.finalize(self, lambda: None)
            self._name = self._shown = os.fsdecode(source)
        with self._errors():
            self.scan = scan_packets(self._name, self._guard)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @cached_property
    def num_frames(self) -> int:
        """The number of frames that decoding everything gives, even if headers state another number.

        Usually the packets show it. For some codecs and containers, everything is decoded once to count.
        """
        from mplug2_fast.video.decode import count_frames

        with self._errors():
            return count_frames(self._name, self.scan, self._threads, self._guard)

    @property
    def fps(self) -> float | None:
        """Average frames per second over the whole duration; None if that is unknown."""
        return self.num_frames / self.duration if self.duration else None

    @cached_property
    def duration(self) -> float | None:
        """Seconds, by the times of the frames, or by their rate if times are missing; None if neither is known."""
        return self.scan.seconds(self.num_frames)

    @cached_property
    def times(self) -> list[float]:
        """The time of each frame, in seconds after the first."""
        from mplug2_fast.video.decode import frame_times

        with self._errors():
            return frame_times(self._name, self.scan, self._threads, self._guard)

    def indices_at(self, seconds: Iterable[float]) -> list[int]:
        """The index of the frame shown at each of these times, in seconds after the first frame."""
        return [max(bisect_right(self.times, time) - 1, 0) for time in seconds]

    @property
    def rotation(self) -> int:
        """Degrees by which frames are rotated counterclockwise to be upright: 0 (the usual case), 90, -90 or 180."""
        return 90 * self._orientation.quarter_turns

    @property
    def mirrored(self) -> bool:
        """Whether frames are mirrored left to right after the rotation."""
        return self._orientation.mirrored

    @cached_property
    def _orientation(self) -> Orientation:
        from mplug2_fast.video.decode import orientation

        with self._errors():
            return orientation(self._name, self.scan, self._guard)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width of the first frame, upright, in the file's size."""
        from mplug2_fast.video.decode import stream_scanned

        with self._errors():
            stream = stream_scanned(self._name, self.scan, [0], threads=1, image_size=None, guard=self._guard)
            first = next(stream)
        return first.shape[:2]

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Decodes frames, in the order of the indices, which may repeat.

        Returns:
            (len(indices), height, width, 3), uint8, RGB, upright.

        Raises:
            IndexError: an index is out of range.
            VideoError: the file cannot be decoded, frames differ in size, or this backend may not decode the file.
        """
        ascending = sorted(set(indices))
        found = dict(zip(ascending, self._stream(ascending), strict=True))
        if not found:
            size = self.size if self._image_size is None else (self._image_size, self._image_size)
            return torch.empty((0, *size, 3), dtype=torch.uint8)
        return torch.from_numpy(np.stack([found[index] for index in indices]))

    def batches(self, indices: Sequence[int] | None = None, batch_size: int = 16) -> Iterator[Tensor]:
        """Yields frames in batches, in one pass through the file that holds one batch at a time.

        Args:
            indices: in ascending order; they may repeat. None means all frames.
            batch_size: frames of a batch; the last may have fewer.

        Yields:
            (frames, height, width, 3), uint8.

        Raises:
            ValueError: indices are not ascending, or the batch size is below 1.
            IndexError, VideoError: as in `frames`. Good batches may have come before.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        indices = range(self.num_frames) if indices is None else indices
        if any(first > second for first, second in pairwise(indices)):
            raise ValueError("indices must be in ascending order, because the file is read in one pass")
        batch: list[np.ndarray] = []
        for pixels in self._stream(list(indices)):
            batch.append(pixels)
            if len(batch) == batch_size:
                yield torch.from_numpy(np.stack(batch))
                batch.clear()
        if batch:
            yield torch.from_numpy(np.stack(batch))

    def _stream(self, indices: list[int]) -> Iterator[np.ndarray]:
        for index in indices[:1] + indices[-1:]:
            if not 0 <= index < self.num_frames:
                raise IndexError(f"{self._shown}: has {self.num_frames:,} frames: there is no frame {index:,}")
        with self._errors():
            yield from stream_frames(
                self.backend,
                self._name,
                self.scan,
                indices,
                threads=self._threads,
                image_size=self._image_size,
                resampling=self._resampling,
                guard=self._guard,
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Starts the time limit. Errors show bytes by their number, because they have no path."""
        self._guard.restart()
        try:
            yield
        except VideoError as error:
            if self._name == self._shown:
                raise
            raise VideoError(str(error).replace(self._name, self._shown, 1)) from error

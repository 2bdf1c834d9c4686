"""One video at a time: frames by their index, whatever decodes them."""

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

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from mplug2_fast.video.orientation import Orientation


class VideoReader:
    """The frames of a video file, or a still image, by index.

    Opening reads the packets once, without decoding and without keeping them; frames are decoded when they are asked
    for. The file itself is never held in memory.

    Args:
        source: a file that PyAV can decode, or the bytes of one.
        backend: "pyav", which decodes everything; "torchcodec", which refuses what it does not decode soundly; None for
            "pyav".
        image_size: height and width that frames are squashed to as soon as they are decoded, by the rule of
            `mplug2_fast.ops.preprocess_frames`; None leaves them as they are.
        threads: for decoding; None takes as many as torch does.
        limits: on time, pixels, frames and memory; None takes the defaults of `Limits`. The time limit starts again
            with each call, and with each frame that is decoded for the caller.

    Raises:
        VideoError: the file cannot be read; one line, "<path>: <reason>".
        BackendError: there is no such backend, or it is not installed.
        ImportError: PyAV is not installed.
    """

    def __init__(
        self,
        source: Source,
        *,
        backend: str | None = None,
        image_size: int | None = None,
        threads: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        from mplug2_fast.video.decode import scan_packets, usual_threads

        self._image_size = image_size
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
        """The number of frames that decoding everything gives, whatever headers say.

        As a rule the packets tell; for some codecs and containers everything is decoded once to count.
        """
        from mplug2_fast.video.decode import count_frames

        with self._errors():
            return count_frames(self._name, self.scan, self._threads, self._guard)

    @property
    def fps(self) -> float | None:
        """Frames a second on average, over the whole duration; None if that is not known."""
        return self.num_frames / self.duration if self.duration else None

    @cached_property
    def duration(self) -> float | None:
        """Seconds, by the times of the frames, or by their rate where times are missing; None if neither is known."""
        return self.scan.seconds(self.num_frames)

    @cached_property
    def times(self) -> list[float]:
        """When each frame is shown, in seconds after the first."""
        from mplug2_fast.video.decode import frame_times

        with self._errors():
            return frame_times(self._name, self.scan, self._threads, self._guard)

    def indices_at(self, seconds: Iterable[float]) -> list[int]:
        """The index of the frame that is shown at each time, in seconds after the first frame."""
        return [max(bisect_right(self.times, time) - 1, 0) for time in seconds]

    @property
    def rotation(self) -> int:
        """Degrees by which frames are turned to be upright, counterclockwise: 0 for most, 90, -90 or 180."""
        return 90 * self._orientation.quarter_turns

    @property
    def mirrored(self) -> bool:
        """Whether frames are mirrored left to right after they are turned."""
        return self._orientation.mirrored

    @cached_property
    def _orientation(self) -> Orientation:
        from mplug2_fast.video.decode import orientation

        with self._errors():
            return orientation(self._name, self.scan, self._guard)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width of the first frame, upright, as it is in the file."""
        from mplug2_fast.video.decode import stream_scanned

        with self._errors():
            stream = stream_scanned(self._name, self.scan, [0], threads=1, image_size=None, guard=self._guard)
            first = next(stream)
        return first.shape[:2]

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Frames in the order of their indices, which may repeat.

        Returns:
            (len(indices), height, width, 3), uint8, RGB, upright.

        Raises:
            IndexError: there is no such frame.
            VideoError: the file cannot be decoded; frames differ in size; or this backend may not decode the file.
        """
        ascending = sorted(set(indices))
        found = dict(zip(ascending, self._stream(ascending), strict=True))
        if not found:
            size = self.size if self._image_size is None else (self._image_size, self._image_size)
            return torch.empty((0, *size, 3), dtype=torch.uint8)
        return torch.from_numpy(np.stack([found[index] for index in indices]))

    def batches(self, indices: Sequence[int] | None = None, batch_size: int = 16) -> Iterator[Tensor]:
        """Frames in batches, in one pass through the file that holds one batch at a time.

        Args:
            indices: in ascending order; they may repeat. None takes all frames.
            batch_size: frames of a batch; the last may have fewer.

        Yields:
            (frames, height, width, 3), uint8.

        Raises:
            ValueError: indices that descend, or a batch size below 1.
            IndexError, VideoError: as in `frames`; perhaps after batches that were good.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        indices = range(self.num_frames) if indices is None else indices
        if any(first > second for first, second in pairwise(indices)):
            raise ValueError("indices must be in ascending order: one pass through the file gives no other")
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
                guard=self._guard,
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Starts the time limit. Bytes have no path by which to call them."""
        self._guard.restart()
        try:
            yield
        except VideoError as error:
            if self._name == self._shown:
                raise
            raise VideoError(str(error).replace(self._name, self._shown, 1)) from error

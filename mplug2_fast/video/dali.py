"""Clips of many files, decoded, squashed and normalised on the GPU by NVIDIA DALI.

No frame passes through the host. DALI decodes some batches ahead while the model computes. Before that, PyAV reads
each file's packets in a thread, which gives the number of frames and shows damage to the container. PyAV decodes what
DALI may not or cannot decode; the clip then states the reason.

By default DALI replaces missing frames by black pictures, and returns fewer frames of files that end early. Here it is
set to fail instead, and its frames are counted. Only PyAV notices damage within a picture that the container does not
show.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mplug2_fast.errors import BackendError, VideoError
from mplug2_fast.ops.preprocess_frames import DTYPES, MEAN, STD, preprocess_frames
from mplug2_fast.video.backends import reason_not_available
from mplug2_fast.video.clip import Clip, Source, check_source
from mplug2_fast.video.indices import frame_indices
from mplug2_fast.video.reader import VideoReader

_CPU_CODECS = ("vp8", "vp9", "mjpeg")
_GPU_CODECS = (*_CPU_CODECS, "av1", "h264", "hevc", "mpeg4")


@dataclass(frozen=True)
class _Job:
    """A file for DALI to decode. Its bytes are memory-mapped and must stay so until DALI has decoded it."""

    index: int
    source: Source
    data: np.ndarray
    indices: list[int]


class DaliLoader:
    """Decodes clips like those of `DecodePool`, but with DALI.

    Args:
        device: a CUDA device. On "cpu" DALI decodes VP8, VP9 and MJPEG only.
        num_frames: frames of a clip, chosen by `frame_indices`.
        image_size: height and width of the squashed frames, in pixels: see `mplug2_fast.ops.preprocess_frames`.
        dtype: of the normalised frames.
        batch_size: files to decode together.
        prefetch: batches to decode ahead.
        threads: of DALI, and of PyAV for the files that DALI does not decode.

    Raises:
        BackendError: DALI is not installed.
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        device: str | torch.device = "cuda",
        *,
        num_frames: int = 16,
        image_size: int = 224,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 4,
        prefetch: int = 2,
        threads: int = 4,
    ) -> None:
        if reason := reason_not_available("dali"):
            raise BackendError(f"the video backend dali is {reason}")
        numbers = {"num_frames": num_frames, "image_size": image_size, "batch_size": batch_size}
        for name, value in (numbers | {"prefetch": prefetch, "threads": threads}).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, not {value!r}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be torch.float32, bfloat16, float16 or float64, not {dtype}")
        self._device = torch.device(device)
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"{device!r} needs a CUDA device, and there is none")
        self._num_frames = num_frames
        self._image_size = image_size
        self._dtype = dtype
        self._batch_size = batch_size
        self._prefetch = prefetch
        self._threads = threads

    def clips(self, sources: Iterable[Source]) -> Iterator[Clip]:
        """Yields one `Clip` for each source, on the device, as soon as it is decoded; the order may differ.

        Sources are read some batches ahead, in the thread that iterates.

        Args:
            sources: paths, or the bytes of files.

        Raises:
            TypeError: a source is neither a path nor bytes.
        """
        with ThreadPoolExecutor(self._threads, thread_name_prefix="dali-scan") as executor:
            feed = _Feed(executor, self._prepare, sources, self._batch_size)
            pipeline = self._pipeline(feed)
            while True:
                started = time.perf_counter()
                try:
                    (output,) = pipeline.run()
                except StopIteration:
                    yield from feed.drain()
                    if feed.exhausted:
                        return
                    pipeline.reset()
                    continue
                except Exception as error:
                    if feed.failure is not None:
                        raise feed.failure from None
                    # The pipeline is lost with its current files: one of them caused the failure.
                    lost = [job for batch in feed.batches for job in batch]
                    feed.batches.clear()
                    if not lost:
                        raise BackendError(f"DALI does not run: {_reason(error)}") from error
                    for job in lost:
                        yield self._alone(job)
                    pipeline = self._pipeline(feed)
                    continue
                jobs = feed.batches.popleft()
                seconds = (time.perf_counter() - started) / len(jobs)
                for job, frames in zip(jobs, output, strict=True):
                    yield self._clip(job, frames, seconds)
                yield from feed.drain()

    def _prepare(self, index: int, source: Source) -> _Job | Clip:
        """The job of a file for DALI, or the finished clip of a file that DALI is not to decode."""
        started = time.perf_counter()
        try:
            with VideoReader(source, threads=1) as reader:
                reason = self._reason_not_served(reader)
                indices = frame_indices(reader.num_frames, self._num_frames) if reason is None else []
        except VideoError as error:
            return Clip(index, source, error=error, seconds=time.perf_counter() - started)
        if reason is not None:
            return self._decode_with_pyav(index, source, reason)
        data = (
            np.frombuffer(source, np.uint8)
            if isinstance(source, bytes)
            else np.memmap(os.fspath(source), np.uint8, "r")
        )
        return _Job(index, source, data, indices)

    def _reason_not_served(self, reader: VideoReader) -> str | None:
        codecs = _GPU_CODECS if self._device.type == "cuda" else _CPU_CODECS
        if reader.scan.codec not in codecs:
            return f"DALI does not decode {reader.scan.codec} on {self._device.type}"
        if not reader.scan.one_frame_a_packet:
            return "the packets of this file do not show which frames it has"
        if reader.rotation or reader.mirrored:
            return "DALI does not rotate or mirror frames to upright"
        if reader.scan.crop is not None:
            return "DALI does not crop frames as the container requires"
        return None

    def _pipeline(self, source: Callable[[], tuple[list[np.ndarray], list[np.ndarray]]]) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = self._device.type == "cuda"
        size = self._image_size

        @pipeline_def(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=self._prefetch,
            exec_dynamic=True,  # its outputs may be kept without a copy
        )
        def graph() -> Any:
            encoded, indices = fn.external_source(
                source=source, num_outputs=2, dtype=[types.UINT8, types.INT32], ndim=[1, 1], no_copy=True
            )
            frames = fn.decoders.video(encoded, frames=indices, pad_mode="none", device="mixed" if on_gpu else "cpu")
            # Nearest neighbour takes the source pixel below (target + 0.5) · step + start. This start makes it
            # target · step, and a quarter of the smallest fraction keeps rounding errors away from whole numbers.
            extent = frames.shape(dtype=types.FLOAT)[1:3]
            start = 0.25 / size - 0.5 * extent / size
            squashed = fn.resize(
                frames, size=[size, size], interp_type=types.INTERP_NN, roi_start=start, roi_end=start + extent
            )
            normalised = fn.crop_mirror_normalize(
                squashed,
                dtype=types.FLOAT,
                mean=[255 * value for value in MEAN],
                std=[255 * value for value in STD],
                output_layout="FCHW",
            )
            return fn.transpose(normalised, perm=[1, 0, 2, 3])

        pipeline = graph()
        pipeline.build()
        return pipeline

    def _clip(self, job: _Job, output: Any, seconds: float) -> Clip:
        frames: Tensor = torch.from_dlpack(output)
        if frames.shape[1] != len(job.indices):
            reason = f"DALI gave {frames.shape[1]} frames instead of {len(job.indices)}"
            return self._decode_with_pyav(job.index, job.source, reason)
        frames = frames.to(self._dtype)
        return Clip(job.index, job.source, frames, indices=job.indices, backend="dali", seconds=seconds)

    def _alone(self, job: _Job) -> Clip:
        """Decodes one file of a lost pipeline alone."""
        batches = iter([([job.data], [np.array(job.indices, np.int32)])])
        started = time.perf_counter()
        try:
            (output,) = self._pipeline(lambda: next(batches)).run()
        except Exception as error:
            return self._decode_with_pyav(job.index, job.source, f"DALI cannot decode it: {_reason(error)}")
        return self._clip(job, output[0], time.perf_counter() - started)

    def _decode_with_pyav(self, index: int, source: Source, reason: str) -> Clip:
        started = time.perf_counter()
        try:
            with VideoReader(source, image_size=self._image_size, threads=self._threads) as reader:
                indices = frame_indices(reader.num_frames, self._num_frames)
                frames = reader.frames(indices)
        except VideoError as error:
            return Clip(index, source, error=error, seconds=time.perf_counter() - started, passed_by=reason)
        video = preprocess_frames(frames.to(self._device), self._image_size, self._dtype)
        seconds = time.perf_counter() - started
        return Clip(index, source, video, indices=indices, backend="pyav", seconds=seconds, passed_by=reason)


class _Feed:
    """Gives DALI its batches: prepares some ahead in threads, and keeps each until it is decoded."""

    def __init__(
        self,
        executor: ThreadPoolExecutor,
        prepare: Callable[[int, Source], _Job | Clip],
        sources: Iterable[Source],
        batch_size: int,
    ) -> None:
        self.batches: deque[list[_Job]] = deque()
        self.exhausted = False
        self.failure: BaseException | None = None
        """The exception that reading the sources raised. DALI would turn it into a string."""
        self._executor = executor
        self._prepare = prepare
        self._sources = enumerate(sources)
        self._batch_size = batch_size
        self._prepared: deque[Future[_Job | Clip]] = deque()
        self._finished: deque[Clip] = deque()  # of files that DALI does not decode

    def drain(self) -> Iterator[Clip]:
        """Yields the clips that were finished without DALI."""
        while self._finished:
            yield self._finished.popleft()

    def __call__(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        try:
            jobs = self._next_batch()
        except Exception as error:
            self.failure = error
            raise
        if not jobs:
            raise StopIteration
        self.batches.append(jobs)
        return [job.data for job in jobs], [np.array(job.indices, np.int32) for job in jobs]

    def _next_batch(self) -> list[_Job]:
        jobs: list[_Job] = []
        while len(jobs) < self._batch_size and len(self._finished) < self._batch_size:
            while len(self._prepared) < 2 * self._batch_size:
                following = next(self._sources, None)
                if following is None:
                    break
                index, source = following
                self._prepared.append(self._executor.submit(self._prepare, index, check_source(source)))
            if not self._prepared:
                self.exhausted = True
                break
            prepared = self._prepared.popleft().result()
            if isinstance(prepared, Clip):
                self._finished.append(prepared)
            else:
                jobs.append(prepared)
        return jobs


def _reason(error: Exception) -> str:
    """The line of DALI's long report that states the cause."""
    lines = [line.strip() for line in str(error).rpartition("encountered:")[2].splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]

"""Decodes clips of many files in other processes while the model computes."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from mplug2_fast.errors import BackendError, VideoError
from mplug2_fast.ops.preprocess_frames import DTYPES
from mplug2_fast.video.backends import check_backend
from mplug2_fast.video.clip import Clip, Source, check_source, shown
from mplug2_fast.video.clips import ClipOptions, Windows
from mplug2_fast.video.limits import Limits
from mplug2_fast.video.preparation import MPLUG2, Preparation
from mplug2_fast.video.worker import Worker

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

# The time for importing numpy and PyAV. A slower process counts as failed.
_START_LIMIT = 120.0
_START_TRIES = 3
_MAX_WAIT = 3600.0
"""Maximum seconds of one wait: the operating system refuses much larger numbers."""


class DecodePool:
    """Worker processes that decode a limited number of files ahead.

    A file that is damaged, takes too long, or crashes its decoder does not affect other files: the process is replaced.
    Frames are passed in shared memory. Use it in a `with` statement; the processes end with it.

    Args:
        num_workers: processes, at least 1.
        timeout: maximum seconds for one clip before its process is killed; None for no limit. Time in which no clip is
            requested does not count.
        num_frames: frames of a clip, chosen by the preparation. Windows have their own length.
        image_size: height and width of the frames' squares, in pixels; None keeps their size.
        dtype: of the normalised frames. torch.uint8 means not normalised: (T, image_size, image_size, 3), for
            `mplug2_fast.ops.preprocess_frames`, for instance on a GPU. Without `image_size`, frames are always uint8.
        backend: "pyav" or "torchcodec"; None for "pyav": see `VideoReader`.
        windows: gives one clip for each window, instead of one for each file.
        prefetch: clips to decode ahead, for each worker.
        threads: threads of each decoder; None divides the usable cores among the workers.
        limits: on the pixels and frames of a file and the memory of a worker; None means the defaults of `Limits`. The
            time limit is `timeout`.
        preparation: which frames are taken, and how they become squares; None is mPLUG-2's: `frame_indices`, squashed
            to the nearest pixels. The workers import its class by name.

    Raises:
        ValueError: an option is out of its range.
        BackendError: the backend is unknown or not installed.
    """

    def __init__(
        self,
        num_workers: int,
        *,
        timeout: float | None = 60.0,
        num_frames: int = 16,
        image_size: int | None = 224,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
        windows: Windows | None = None,
        prefetch: int = 2,
        threads: int | None = None,
        limits: Limits | None = None,
        preparation: Preparation | None = None,
    ) -> None:
        numbers = {"num_workers": num_workers, "num_frames": num_frames, "prefetch": prefetch}
        numbers |= {
            name: value for name, value in (("image_size", image_size), ("threads", threads)) if value is not None
        }
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, not {value!r}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, or None, not {timeout!r}")
        if dtype is not torch.uint8 and dtype not in DTYPES:
            raise ValueError(f"dtype must be torch.uint8, float32, bfloat16, float16 or float64, not {dtype}")
        threads = max(len(os.sched_getaffinity(0)) // num_workers, 1) if threads is None else threads
        limits = replace(Limits() if limits is None else limits, seconds=None)
        self._preparation = MPLUG2 if preparation is None else preparation
        backend = check_backend(backend)
        options = ClipOptions(num_frames, image_size, windows, threads, backend, limits, self._preparation)
        self._image_size = image_size
        self._dtype = dtype
        self._ahead = num_workers * prefetch
        self._supervisor = _Supervisor(num_workers, options, timeout, self._ahead)
        self._busy = False

    def __enter__(self) -> Self:
        self._supervisor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._supervisor.close()

    @property
    def pids(self) -> list[int]:
        """The ids of the present worker processes."""
        return self._supervisor.pids()

    def clips(self, sources: Iterable[Source]) -> Iterator[Clip]:
        """Yields the clips of the files as soon as they are ready; the order of the files may differ.

        Each source gives one `Clip`, or with windows at least one, of which exactly one is `last`. Clips of one file
        come in order. A few sources are read ahead, in the thread that iterates. You may stop early.

        Args:
            sources: paths, or the bytes of files.

        Raises:
            RuntimeError: the pool is used outside its `with` statement, or by two iterations at the same time.
            BackendError: workers cannot be started.
            TypeError: a source is neither a path nor bytes.
        """
        if not self._supervisor.is_alive():
            raise RuntimeError("use a DecodePool in a with statement: with DecodePool(...) as pool: ...")
        if self._busy:
            raise RuntimeError("another iteration of this DecodePool has not ended: finish or close it first")
        self._busy = True
        numbered = enumerate(sources)
        waiting: dict[int, Source] = {}  # files with clips still to come
        try:
            more = True
            while more or waiting:
                while more and self._supervisor.has_room():
                    if more := (following := next(numbered, None)) is not None:
                        index, source = following
                        waiting[index] = check_source(source)
                        self._supervisor.add(index, source)
                answer = self._supervisor.take(more) if waiting else None
                if answer is not None:
                    clip = self._clip(answer.index, waiting[answer.index], answer.fields)
                    if clip.last:
                        del waiting[clip.index]
                    yield clip
        finally:
            self._supervisor.forget()
            self._busy = False

    def _clip(self, index: int, source: Source, answer: dict[str, Any]) -> Clip:
        seconds = answer["seconds"]
        if "error" in answer:
            error = VideoError(f"{shown(source)}: {answer['error']}")
            return Clip(index, source, error=error, seconds=seconds, transient=answer.get("transient", False))
        memory, shape = answer["memory"], answer["shape"]
        size = int(np.prod(shape))
        indices = np.frombuffer(memory, np.int64, offset=size).tolist()
        frames = torch.frombuffer(memory, dtype=torch.uint8, count=size).view(shape)
        if self._image_size is not None and self._dtype is not torch.uint8:
            frames = self._preparation.tensor(frames, self._dtype, tuple(answer["size"]))
        return Clip(
            index,
            source,
            frames,
            indices=indices,
            backend=answer["backend"],
            seconds=seconds,
            window=answer["window"],
            last=answer["last"],
            size=tuple(answer["size"]),
        )


@dataclass(frozen=True)
class _Task:
    """A file for a worker to decode."""

    index: int
    source: Source
    run: int


@dataclass
class _Queue:
    """The tasks of a worker: the current file, then the next one.

    `since` is the time when work on the current file began; None if there is no file, or the worker is paused.
    """

    tasks: deque[_Task] = field(default_factory=deque)
    since: float | None = None

    def is_paused(self) -> bool:
        """Whether the worker has sent a clip and waits for the request for the next one."""
        return bool(self.tasks) and self.since is None


class _Answer(NamedTuple):
    """A worker's answer about a file."""

    index: int
    fields: dict[str, Any]


class _Supervisor(threading.Thread):
    """The thread that gives the workers files and watches their time limits."""

    def __init__(self, num_workers: int, options: ClipOptions, timeout: float | None, ahead: int) -> None:
        super().__init__(name="decode-pool", daemon=True)
        self._num_workers = num_workers
        self._options = options
        self._timeout = timeout
        self._ahead = ahead
        # A worker has the next file already, so that it need not wait between files. With windows it has only one file:
        # it sends one window for each request, and a new file would end the current one.
        self._depth = 2 if options.windows is None else 1
        self._changed = threading.Condition()
        self._files: deque[tuple[int, Source]] = deque()
        self._ready: deque[_Answer] = deque()
        self._run = 0  # the number of the current iteration, to which files and answers belong
        self._idle = True  # a worker would do more if there were files and room for their clips
        self._failure: BaseException | None = None
        self._closed = False
        self._alarm, self._alarmed = socket.socketpair()
        self._alarm.setblocking(False)
        # Only this thread changes the attributes below.
        self._selector = selectors.DefaultSelector()
        self._starting: dict[Worker, float] = {}
        self._queues: dict[Worker, _Queue] = {}
        self._failed_starts = 0

    # Called by other threads.

    def pids(self) -> list[int]:
        return [worker.pid for worker in [*self._starting, *self._queues]]

    def has_room(self) -> bool:
        return len(self._files) < self._ahead

    def add(self, index: int, source: Source) -> None:
        with self._changed:
            self._files.append((index, source))
            idle = self._idle
        if idle:
            self._wake()

    def take(self, more: bool) -> _Answer | None:
        """Waits for the next answer. If there are `more` files, returns None as soon as there is room for them."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._failure or self._closed or (more and self.has_room()))
            if self._closed:
                raise RuntimeError("the DecodePool was closed while its clips were being iterated")
            if not self._ready and not self._failure:
                return None
            if self._failure:
                raise BackendError(f"the decoding processes failed: {self._failure}") from self._failure
            answer = self._ready.popleft()
            idle = self._idle
        if idle:
            self._wake()
        return answer

    def forget(self) -> None:
        """Drops all files and answers, because the iteration has ended."""
        with self._changed:
            self._run += 1
            self._files.clear()
            self._ready.clear()
        self._wake()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._wake()
        self.join()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # enough alarms are waiting already, or the thread has ended
            self._alarm.send(b"!")

    # Called by this thread.

    def run(self) -> None:
        try:
            self._selector.register(self._alarmed, selectors.EVENT_READ)
            while not self._closed:
                while len(self._starting) + len(self._queues) < self._num_workers:
                    self._start_worker()
                self._assign()
                self._listen()
                self._end_late_workers()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        finally:
            for worker in [*self._starting, *self._queues]:
                worker.end()
            self._selector.close()
            self._alarm.close()
            self._alarmed.close()

    def _start_worker(self) -> None:
        worker = Worker(self._options)
        self._starting[worker] = time.monotonic()
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)

    def _assign(self) -> None:
        """Requests further clips of current files first, then gives files to workers without one."""
        started: list[tuple[Worker, _Task]] = []
        with self._changed:
            for queue in self._queues.values():
                if queue.is_paused() and queue.tasks[0].run != self._run:
                    queue.tasks.clear()  # the rest of this file is no longer needed
            paused = [worker for worker, queue in self._queues.items() if queue.is_paused()]
            room = self._ahead - len(self._ready) - sum(len(queue.tasks) for queue in self._queues.values())
            requested = paused[: max(room + len(paused), 0)]
            for depth in range(1, self._depth + 1):
                for worker, queue in self._queues.items():
                    if room > 0 and self._files and len(queue.tasks) < depth:
                        room -= 1
                        queue.tasks.append(_Task(*self._files.popleft(), self._run))
                        started.append((worker, queue.tasks[-1]))
            short = any(len(queue.tasks) < self._depth for queue in self._queues.values())
            self._idle = short or len(requested) < len(paused)
            if started:
                self._changed.notify_all()
        for worker in requested:
            self._queues[worker].since = time.monotonic()
            with contextlib.suppress(ConnectionError):  # it has died, which `_listen` will notice
                worker.proceed()
        for worker, task in started:
            self._begin(worker, task)

    def _begin(self, worker: Worker, task: _Task) -> None:
        queue = self._queues[worker]
        if queue.since is None:
            queue.since = time.monotonic()
        try:
            worker.start(task.source)
        except OSError as error:
            queue.tasks.remove(task)
            if not queue.tasks:
                queue.since = None
            if isinstance(error, (ConnectionError, BlockingIOError)):
                # The worker has died, which `_listen` will notice: the file is not the cause. Or the name of the
                # current file is so long that another does not fit into the connection.
                self._take_back(task)
            else:  # the file's name or its bytes are too large to send
                self._hand_over(task, {"error": f"cannot be sent to a decoder: {error.strerror}", "seconds": 0.0})

    def _take_back(self, task: _Task) -> None:
        with self._changed:
            if task.run == self._run:
                self._files.appendleft((task.index, task.source))

    def _listen(self) -> None:
        for key, _ in self._selector.select(self._seconds_left()):
            if key.data is None:
                self._alarmed.recv(4096)
            else:
                self._hear(key.data, key.data.receive())

    def _seconds_left(self) -> float | None:
        ends = [since + _START_LIMIT for since in self._starting.values()]
        if self._timeout is not None:
            ends += [queue.since + self._timeout for queue in self._queues.values() if queue.since is not None]
        return min(max(min(ends) - time.monotonic(), 0), _MAX_WAIT) if ends else None

    def _hear(self, worker: Worker, answer: dict[str, Any] | None) -> None:
        if answer is None:
            self._lose(worker, "its decoder died")
        elif "failed" in answer:
            raise RuntimeError(f"a decoding process cannot start:\n{answer['failed']}")
        elif worker in self._starting:
            del self._starting[worker]
            self._queues[worker] = _Queue()
            self._failed_starts = 0
        else:
            queue = self._queues[worker]
            task, last = queue.tasks[0], answer.get("last", True)
            if last:
                queue.tasks.popleft()
            queue.since = time.monotonic() if last and queue.tasks else None
            self._hand_over(task, answer)

    def _hand_over(self, task: _Task, answer: dict[str, Any]) -> None:
        with self._changed:
            if task.run == self._run:
                self._ready.append(_Answer(task.index, answer))
                self._changed.notify_all()

    def _end_late_workers(self) -> None:
        now = time.monotonic()
        for worker, since in list(self._starting.items()):
            if now >= since + _START_LIMIT:
                self._lose(worker, "")
        for worker, queue in list(self._queues.items()):
            if queue.since is not None and self._timeout is not None and now >= queue.since + self._timeout:
                self._lose(worker, f"takes too long: decoding was stopped after {self._timeout:g} s", killed=True)

    def _lose(self, worker: Worker, reason: str, *, killed: bool = False) -> None:
        """Ends a worker. Its current file fails; its next file goes to another worker."""
        self._selector.unregister(worker.socket)
        ended = worker.end()
        if self._starting.pop(worker, None) is not None:
            self._failed_starts += 1
            if self._failed_starts >= _START_TRIES:
                raise RuntimeError(f"a decoding process does not start: {ended}")
            return
        queue = self._queues.pop(worker)
        for task in list(queue.tasks)[1:]:
            self._take_back(task)
        if queue.tasks:
            reason = reason if killed else f"{reason} ({ended})"
            seconds = 0.0 if queue.since is None else time.monotonic() - queue.since
            self._hand_over(queue.tasks[0], {"error": reason, "seconds": seconds, "transient": True})

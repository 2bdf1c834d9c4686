"""Clips of many files, decoded in other processes while the model computes."""

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
from mplug2_fast.ops.preprocess_frames import DTYPES, preprocess_frames
from mplug2_fast.video.backends import check_backend
from mplug2_fast.video.clip import Clip, Source, check_source, shown
from mplug2_fast.video.clips import ClipOptions, Windows
from mplug2_fast.video.limits import Limits
from mplug2_fast.video.worker import Worker

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

# A Python that cannot import numpy and PyAV in this time never will.
_START_LIMIT = 120.0
_START_TRIES = 3
_MAX_WAIT = 3600.0
"""Seconds of one wait: the operating system takes no number that is much larger."""


class DecodePool:
    """Worker processes that decode files, ahead of what is asked for and within bounds.

    A file that is broken, that takes too long, or that takes its decoder down costs only itself: the process is
    replaced. Frames come through shared memory. To be used in a `with` statement, whose end ends the processes.

    Args:
        num_workers: processes, at least 1.
        timeout: seconds that decoding one clip may take before its process is killed; None for no limit. Time in
            which nobody asks for clips does not count.
        num_frames: frames of a clip: see `frame_indices`. Windows have their own length.
        image_size: height and width that frames are squashed to, in pixels; None leaves them as they are.
        dtype: of the frames, normalised as the model takes them; torch.uint8 squashes only, leaving (T, image_size,
            image_size, 3) to `mplug2_fast.ops.preprocess_frames`, on a GPU for instance. Without `image_size`, frames
            are uint8 in any case.
        backend: "pyav" or "torchcodec"; None for "pyav": see `VideoReader`.
        windows: one clip a window rather than one a file.
        prefetch: clips that are decoded ahead, for each worker.
        threads: threads of each decoder; None shares the usable cores among the workers.
        limits: on the pixels and frames of a file and the memory of a worker; None takes the defaults of `Limits`. The
            time limit is `timeout`.

    Raises:
        ValueError: an option out of its range.
        BackendError: there is no such backend, or it is not installed.
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
        options = ClipOptions(num_frames, image_size, windows, threads, check_backend(backend), limits)
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
        """The worker processes that are there now."""
        return self._supervisor.pids()

    def clips(self, sources: Iterable[Source]) -> Iterator[Clip]:
        """What comes of each file, in the order in which it is ready.

        Each source gives one `Clip`, or with windows at least one, of which exactly one is `last`. Clips of one file
        come in their order. Sources are drawn a few ahead, in the thread that iterates. Stopping early is fine.

        Args:
            sources: paths, or the bytes of files.

        Raises:
            RuntimeError: the pool is not in its `with` statement, or is iterated twice at a time.
            BackendError: workers cannot be started.
            TypeError: a source is neither a path nor bytes.
        """
        if not self._supervisor.is_alive():
            raise RuntimeError("a DecodePool works within its with statement: with DecodePool(...) as pool: ...")
        if self._busy:
            raise RuntimeError("clips of this DecodePool are being iterated already: finish or close that first")
        self._busy = True
        numbered = enumerate(sources)
        waiting: dict[int, Source] = {}  # files of which something is still to come
        try:
            more = True
            while more or waiting:
                while more and self._supervisor.wants_files():
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
            frames = preprocess_frames(frames, self._image_size, self._dtype)
        return Clip(
            index,
            source,
            frames,
            indices=indices,
            backend=answer["backend"],
            seconds=seconds,
            window=answer["window"],
            last=answer["last"],
        )


@dataclass(frozen=True)
class _Task:
    """A file that a worker is to decode."""

    index: int
    source: Source
    run: int


@dataclass
class _Desk:
    """What lies before a worker: the file that it is at, then the one that it goes on with; and since when it has been
    at the first, None while there is none or it waits for being asked on."""

    tasks: deque[_Task] = field(default_factory=deque)
    since: float | None = None

    def waits(self) -> bool:
        """Whether the worker has begun with a file and waits for being asked on."""
        return bool(self.tasks) and self.since is None


class _Answer(NamedTuple):
    """What a worker said about a file."""

    index: int
    fields: dict[str, Any]


class _Supervisor(threading.Thread):
    """Keeps the workers busy, within bounds and time limits, while the other threads do something else."""

    def __init__(self, num_workers: int, options: ClipOptions, timeout: float | None, ahead: int) -> None:
        super().__init__(name="decode-pool", daemon=True)
        self._num_workers = num_workers
        self._options = options
        self._timeout = timeout
        self._ahead = ahead
        # A worker that finds its next file before it need not wait until this process has heard of the last one. Of
        # windows it gives one at a time, and takes another file for the end of the one that it is at.
        self._depth = 2 if options.windows is None else 1
        self._changed = threading.Condition()
        self._files: deque[tuple[int, Source]] = deque()
        self._ready: deque[_Answer] = deque()
        self._run = 0  # the number of the iteration that files and answers belong to
        self._hungry = True  # a worker would take more, if there were files and room for what comes of them
        self._failure: BaseException | None = None
        self._closed = False
        self._alarm, self._alarmed = socket.socketpair()
        self._alarm.setblocking(False)
        # The rest is written by this thread alone.
        self._selector = selectors.DefaultSelector()
        self._starting: dict[Worker, float] = {}
        self._desks: dict[Worker, _Desk] = {}
        self._failed_starts = 0

    # What other threads call.

    def pids(self) -> list[int]:
        return [worker.pid for worker in [*self._starting, *self._desks]]

    def wants_files(self) -> bool:
        return len(self._files) < self._ahead

    def add(self, index: int, source: Source) -> None:
        with self._changed:
            self._files.append((index, source))
            hungry = self._hungry
        if hungry:
            self._wake()

    def take(self, more: bool) -> _Answer | None:
        """The next answer; waits for it, or if there are `more` files, until some are wanted."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._ready or self._failure or self._closed or (more and self.wants_files())
            )
            if self._closed:
                raise RuntimeError("the DecodePool was closed while its clips were being iterated")
            if not self._ready and not self._failure:
                return None
            if self._failure:
                raise BackendError(f"the decoding processes failed: {self._failure}") from self._failure
            answer = self._ready.popleft()
            hungry = self._hungry
        if hungry:
            self._wake()
        return answer

    def forget(self) -> None:
        """Drop files and answers: nobody asks for them any more."""
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
        with contextlib.suppress(OSError):  # alarms enough are waiting, or the thread has ended
            self._alarm.send(b"!")

    # The thread.

    def run(self) -> None:
        try:
            self._selector.register(self._alarmed, selectors.EVENT_READ)
            while not self._closed:
                while len(self._starting) + len(self._desks) < self._num_workers:
                    self._start_worker()
                self._assign()
                self._listen()
                self._end_late_workers()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        finally:
            for worker in [*self._starting, *self._desks]:
                worker.end()
            self._selector.close()
            self._alarm.close()
            self._alarmed.close()

    def _start_worker(self) -> None:
        worker = Worker(self._options)
        self._starting[worker] = time.monotonic()
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)

    def _assign(self) -> None:
        """Files that are begun come first, then workers that have none."""
        begin: list[tuple[Worker, _Task]] = []
        with self._changed:
            for desk in self._desks.values():
                if desk.waits() and desk.tasks[0].run != self._run:
                    desk.tasks.clear()  # nobody asks for the rest of this file
            begun = [worker for worker, desk in self._desks.items() if desk.waits()]
            room = self._ahead - len(self._ready) - sum(len(desk.tasks) for desk in self._desks.values())
            asked = begun[: max(room + len(begun), 0)]
            for depth in range(1, self._depth + 1):
                for worker, desk in self._desks.items():
                    if room > 0 and self._files and len(desk.tasks) < depth:
                        room -= 1
                        desk.tasks.append(_Task(*self._files.popleft(), self._run))
                        begin.append((worker, desk.tasks[-1]))
            short = any(len(desk.tasks) < self._depth for desk in self._desks.values())
            self._hungry = short or len(asked) < len(begun)
            if begin:
                self._changed.notify_all()
        for worker in asked:
            self._desks[worker].since = time.monotonic()
            with contextlib.suppress(ConnectionError):  # it died before, as listening will find out
                worker.proceed()
        for worker, task in begin:
            self._begin(worker, task)

    def _begin(self, worker: Worker, task: _Task) -> None:
        desk = self._desks[worker]
        if desk.since is None:
            desk.since = time.monotonic()
        try:
            worker.start(task.source)
        except OSError as error:
            desk.tasks.remove(task)
            if not desk.tasks:
                desk.since = None
            if isinstance(error, (ConnectionError, BlockingIOError)):
                # The worker died before, as listening will find out: a file that it never saw is not to blame. Or the
                # name of the file that lies before it is so long that no other fits beside it.
                self._take_back(task)
            else:  # the file's name or its bytes are too large to send
                self._hand_over(task, {"error": f"cannot be handed to a decoder: {error.strerror}", "seconds": 0.0})

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
            ends += [desk.since + self._timeout for desk in self._desks.values() if desk.since is not None]
        return min(max(min(ends) - time.monotonic(), 0), _MAX_WAIT) if ends else None

    def _hear(self, worker: Worker, answer: dict[str, Any] | None) -> None:
        if answer is None:
            self._lose(worker, "its decoder died")
        elif "failed" in answer:
            raise RuntimeError(f"a decoding process cannot start:\n{answer['failed']}")
        elif worker in self._starting:
            del self._starting[worker]
            self._desks[worker] = _Desk()
            self._failed_starts = 0
        else:
            desk = self._desks[worker]
            task, last = desk.tasks[0], answer.get("last", True)
            if last:
                desk.tasks.popleft()
            desk.since = time.monotonic() if last and desk.tasks else None
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
        for worker, desk in list(self._desks.items()):
            if desk.since is not None and self._timeout is not None and now >= desk.since + self._timeout:
                self._lose(worker, f"takes too long: decoding was stopped after {self._timeout:g} s", killed=True)

    def _lose(self, worker: Worker, reason: str, *, killed: bool = False) -> None:
        """End a worker, which costs the file that it is at; what else lies before it goes to another."""
        self._selector.unregister(worker.socket)
        ended = worker.end()
        if self._starting.pop(worker, None) is not None:
            self._failed_starts += 1
            if self._failed_starts >= _START_TRIES:
                raise RuntimeError(f"a decoding process does not start: {ended}")
            return
        desk = self._desks.pop(worker)
        for task in list(desk.tasks)[1:]:
            self._take_back(task)
        if desk.tasks:
            reason = reason if killed else f"{reason} ({ended})"
            seconds = 0.0 if desk.since is None else time.monotonic() - desk.since
            self._hand_over(desk.tasks[0], {"error": reason, "seconds": seconds, "transient": True})

"""Decoded clips to batches for the model.

Which clips share a batch follows from the list of videos alone, not from how fast they were decoded or from what an
earlier run had finished: in the last digits, what a model makes of a clip depends on the others in its batch, and a run
that is taken up again is to give the very numbers of one that was never interrupted.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

    from mplug2_fast.video import Clip

_T = TypeVar("_T")


@dataclass(frozen=True)
class Batch:
    """Clips that the model computes together, and files that gave none; `clips` or `failed` may be empty.

    A clip's `index` is the number of its video in the whole run.
    """

    clips: list[Clip]
    failed: list[Clip]


def in_groups(count: int, size: int) -> list[range]:
    """The numbers below `count` in groups of `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def batches_of_videos(clips: Iterable[Clip], groups: Sequence[Sequence[int]]) -> Iterator[Batch]:
    """A batch for each group of videos, as soon as all of its clips are there.

    Args:
        clips: one for each video, in any order.
        groups: numbers of videos, each in one group.
    """
    group_of = {number: group for group, numbers in enumerate(groups) for number in numbers}
    gathered: dict[int, list[Clip]] = {}
    for clip in clips:
        group = group_of[clip.index]
        members = gathered.setdefault(group, [])
        members.append(clip)
        if len(members) == len(groups[group]):
            members.sort(key=lambda clip: clip.index)
            del gathered[group]
            yield Batch(
                [clip for clip in members if clip.error is None], [clip for clip in members if clip.error is not None]
            )


def batches_of_windows(clips: Iterable[Clip], size: int) -> Iterator[Batch]:
    """Batches of up to `size` windows of one video, in their order; those of different videos may alternate.

    After an error, the windows of that video that are left are dropped.
    """
    gathered: dict[int, list[Clip]] = {}
    for clip in clips:
        if clip.error is not None:
            gathered.pop(clip.index, None)
            yield Batch([], [clip])
            continue
        windows = gathered.setdefault(clip.index, [])
        windows.append(clip)
        if clip.last or len(windows) == size:
            yield Batch(gathered.pop(clip.index), [])


class Ahead:
    """Draws from an iterator in a thread, one item ahead of what is asked for.

    To be used in a `with` statement, whose end waits for the thread: whatever the iterator may be waiting for has to be
    ended before that.
    """

    def __init__(self) -> None:
        self._ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=1)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        while self._thread is not None and self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)

    def of(self, items: Iterator[_T]) -> Iterator[_T]:
        """The items. What their iterator raises is raised here."""
        self._thread = threading.Thread(target=self._draw, args=(items,), name="batches", daemon=True)
        self._thread.start()
        while True:
            item, error = self._ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item

    def _draw(self, items: Iterator[_T]) -> None:
        try:
            for item in items:
                self._ready.put((item, None))
                if self._stopped.is_set():
                    return
            self._ready.put((None, StopIteration()))
        except BaseException as error:
            self._ready.put((None, error))

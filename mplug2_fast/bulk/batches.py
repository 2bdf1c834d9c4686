"""Groups decoded clips into batches for the model.

The list of videos alone decides which clips share a batch; decoding speed and earlier runs do not matter. The last
digits of a result depend on the other clips of the batch, so only this makes a resumed run give exactly the results of
an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from typing_extensions import Self

    from mplug2_fast.video import Clip

_T = TypeVar("_T")


@dataclass(frozen=True)
class Batch:
    """Clips that the model computes together, and clips whose decoding failed. Either list may be empty.

    A clip's `index` is the number of its video in the whole run.
    """

    clips: list[Clip]
    failed: list[Clip]


def in_groups(count: int, size: int) -> list[range]:
    """The numbers below `count` in groups of `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def joined(clips: Iterable[Clip], owners: Sequence[int]) -> Iterator[Clip]:
    """One clip for each source, from the clips of its files. The frames of several files become `(files, ...)`.

    If a file has an error, so has the source.

    Args:
        clips: one per file, in any order, or several of a source with one file.
        owners: the source of each file, by its number.
    """
    counts = Counter(owners)
    gathered: dict[int, list[Clip]] = {}
    for clip in clips:
        owner = owners[clip.index]
        if counts[owner] == 1:
            yield replace(clip, index=owner)
            continue
        members = gathered.setdefault(owner, [])
        members.append(clip)
        if len(members) == counts[owner]:
            members = sorted(gathered.pop(owner), key=lambda clip: clip.index)
            told = next((clip for clip in members if clip.error is not None), members[0])
            frames = None if told.error is not None else torch.stack([clip.frames for clip in members])
            yield replace(told, index=owner, frames=frames, seconds=sum(clip.seconds for clip in members))


def batches_of_videos(clips: Iterable[Clip], groups: Sequence[Sequence[int]]) -> Iterator[Batch]:
    """Yields a batch for each group of videos as soon as all of its clips are decoded.

    Args:
        clips: one per video, in any order.
        groups: numbers of videos. Each number is in exactly one group.
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
    """Yields batches of up to `size` windows of one video, in order. Batches of different videos may alternate.

    After an error, the remaining windows of that video are dropped.
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
    """Runs an iterator in a thread, one item ahead of its consumer.

    Use it in a `with` statement. The end of the statement waits for the thread, so end whatever the iterator may wait
    for first.
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
        """Yields the items. Exceptions of their iterator are raised here."""
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

"""Which clips share a batch, and the thread that prepares batches."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mplug2_fast.bulk.batches import Ahead, batches_of_videos, batches_of_windows, in_groups
from mplug2_fast.bulk.memory import CPU_BUDGET, MAX_BATCH, batch_size
from mplug2_fast.errors import VideoError
from mplug2_fast.models.mplug2.config import MPlug2Config
from mplug2_fast.predict.memory import clip_bytes
from mplug2_fast.video import Clip, DecodePool
from tests.bulk.files import write_clip

CPU = torch.device("cpu")


def clip(index: int, window: int = 0, last: bool = True) -> Clip:
    return Clip(index, f"{index}.mp4", torch.zeros(1), window=window, last=last)


def broken(index: int) -> Clip:
    return Clip(index, f"{index}.mp4", error=VideoError("bad"))


def test_groups_hold_every_number_once() -> None:
    assert in_groups(7, 3) == [range(3), range(3, 6), range(6, 7)]
    assert in_groups(0, 3) == []


def test_batches_of_videos_do_not_depend_on_the_order_in_which_clips_come() -> None:
    groups = [[0, 1, 2], [5, 6], [9]]
    clips = [clip(0), broken(1), clip(2), broken(5), broken(6), clip(9)]
    shapes = {}
    for seed in range(20):
        random.Random(seed).shuffle(clips)
        for batch in batches_of_videos(clips, groups):
            key = min(found.index for found in batch.clips + batch.failed)
            shape = ([found.index for found in batch.clips], [found.index for found in batch.failed])
            assert shapes.setdefault(key, shape) == shape
    assert shapes == {0: ([0, 2], [1]), 5: ([], [5, 6]), 9: ([9], [])}


def test_a_batch_comes_as_soon_as_it_is_whole() -> None:
    drawn = []

    def clips() -> Iterator[Clip]:
        for index in (2, 0, 3, 1):
            drawn.append(index)
            yield clip(index)

    batches = batches_of_videos(clips(), [[0, 1], [2, 3]])
    assert [found.index for found in next(batches).clips] == [2, 3]
    assert drawn == [2, 0, 3]


def test_batches_of_windows_hold_one_video_each() -> None:
    clips = [clip(0, window, window == 4) for window in range(5)]
    clips[1:1] = [clip(1, 0, False), clip(1, 1, False), clip(1, 2, False), broken(1), broken(2)]
    found = [
        ([(item.index, item.window) for item in batch.clips], [item.index for item in batch.failed])
        for batch in batches_of_windows(clips, 2)
    ]
    assert found == [
        ([(1, 0), (1, 1)], []),
        ([], [1]),
        ([], [2]),
        ([(0, 0), (0, 1)], []),
        ([(0, 2), (0, 3)], []),
        ([(0, 4)], []),
    ]


def test_items_are_drawn_ahead_but_not_far() -> None:
    drawn = []

    def items() -> Iterator[int]:
        for number in range(20):
            drawn.append(number)
            yield number

    with Ahead() as ahead:
        found = ahead.of(items())
        assert next(found) == 0
        deadline = time.monotonic() + 60
        while len(drawn) < 3:
            assert time.monotonic() < deadline
        time.sleep(0.05)
        assert len(drawn) == 3
        assert list(found) == list(range(1, 20))
    assert all(thread.name != "batches" for thread in threading.enumerate())


def test_errors_come_where_the_item_would_have_come() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("two")

    with Ahead() as ahead:
        found = ahead.of(items())
        assert next(found) == 1
        with pytest.raises(KeyError, match="two"):
            next(found)


def test_an_interrupt_does_not_wait_for_the_file_that_is_being_decoded(tmp_path: Path) -> None:
    file = str(write_clip(tmp_path / "a.mp4", "mpeg4", seed=0))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    main = threading.main_thread().ident
    started = time.monotonic()
    caught = False
    try:
        with Ahead() as ahead, DecodePool(1, num_frames=2, image_size=8) as pool:
            list(pool.clips([file]))
            os.kill(pool.pids[0], signal.SIGSTOP)
            threading.Timer(0.3, signal.pthread_kill, [main, signal.SIGUSR1]).start()
            next(ahead.of(batches_of_videos(pool.clips([file]), [[0]])))
    except KeyboardInterrupt:
        caught = True
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert caught
    assert time.monotonic() - started < 50  # the time limit of a file is 60 s
    assert all(thread.name != "batches" for thread in threading.enumerate())


def test_the_batch_follows_from_the_memory() -> None:
    large, tiny = MPlug2Config.preset("large"), MPlug2Config.preset("tiny")
    options = {"num_frames": 16, "itemsize": 4, "num_beams": 5, "max_length": 20}
    of_large, of_tiny = clip_bytes(large, **options), clip_bytes(tiny, **options)
    assert of_large > 100 * of_tiny
    assert batch_size(of_large, CPU, 10 * of_large + 1) == 10
    assert batch_size(of_large, CPU, 1) == 1
    assert batch_size(of_tiny, CPU, 2**40) == MAX_BATCH["cpu"]
    assert batch_size(of_large, CPU) <= CPU_BUDGET // of_large
    assert clip_bytes(large, **{**options, "itemsize": 2}) < 0.6 * of_large
    assert clip_bytes(large, **{**options, "num_frames": 32}) > 1.8 * of_large

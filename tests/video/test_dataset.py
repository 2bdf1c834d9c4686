"""Clips for training: random frames of each interval, and the share of each rank and worker."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mplug2_fast import VideoError
from mplug2_fast.ops import preprocess_frames
from mplug2_fast.video import ClipDataset, VideoReader, frame_indices, load_video, random_frame_indices
from tests.video.clips import moving_frames, write_video


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [
        write_video(folder / f"{number}.mp4", "libx264", moving_frames(15 + number)[number:], gop=4)
        for number in range(7)
    ]


@settings(deadline=None)
@given(total=st.integers(1, 3000), num_frames=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_a_random_frame_of_each_interval(total, num_frames, seed):
    indices = random_frame_indices(total, num_frames, np.random.default_rng(seed))
    taken = min(total, num_frames)
    assert len(indices) == num_frames
    assert indices[taken:] == [indices[taken - 1]] * (num_frames - taken)
    bounds = np.linspace(0, total, taken + 1).astype(int)
    assert all(first <= index < end for first, index, end in zip(bounds, indices, bounds[1:], strict=False))
    assert all(
        first <= index < end
        for first, index, end in zip(bounds, frame_indices(total, num_frames), bounds[1:], strict=False)
    )


def test_every_frame_of_an_interval_comes_as_often():
    generator = np.random.default_rng(0)
    counts = Counter(index for _ in range(3000) for index in random_frame_indices(10, 4, generator))
    for first, end in ((0, 2), (2, 5), (5, 7), (7, 10)):
        for index in range(first, end):
            assert counts[index] == pytest.approx(3000 / (end - first), rel=0.15)


def test_evaluation_takes_each_file_once_in_order(paths):
    dataset = ClipDataset(paths, num_frames=4, image_size=24, training=False)
    found = list(dataset)
    assert [clip["index"] for clip in found] == list(range(7))
    for clip, path in zip(found, paths, strict=True):
        assert torch.equal(clip["frames"], load_video(path, 4, 24))
    shares = [
        [clip["index"] for clip in ClipDataset(paths, image_size=8, training=False, rank=rank, world_size=3)]
        for rank in range(3)
    ]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


def test_training_takes_random_frames_which_the_seed_and_the_epoch_decide(paths):
    def epoch(number, **options):
        dataset = ClipDataset(paths, num_frames=3, image_size=16, **options)
        dataset.set_epoch(number)
        return list(dataset)

    first, again, second, other_seed = epoch(0), epoch(0), epoch(1), epoch(0, seed=1)
    order = [clip["index"] for clip in first]
    assert sorted(order) == list(range(7))
    assert order == [clip["index"] for clip in again]
    assert all(torch.equal(a["frames"], b["frames"]) for a, b in zip(first, again, strict=True))
    for others in (second, other_seed):
        assert [clip["index"] for clip in others] != order
        frames = {clip["index"]: clip["frames"] for clip in others}
        assert any(not torch.equal(frames[clip["index"]], clip["frames"]) for clip in first)
    for clip in first:
        everything = preprocess_frames(VideoReader(paths[clip["index"]]).frames(range(15)), 16)
        for position, (start, end) in enumerate(((0, 5), (5, 10), (10, 15))):
            matches = [torch.equal(clip["frames"][:, position], everything[:, index]) for index in range(start, end)]
            assert sum(matches) == 1


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (3, 0), (2, 2)])
def test_ranks_and_workers_share_the_files(paths, world_size, workers):
    alone = {clip["index"]: clip["frames"] for clip in ClipDataset(paths, num_frames=2, image_size=8)}
    indices, lengths = Counter(), []
    for rank in range(world_size):
        dataset = ClipDataset(paths, num_frames=2, image_size=8, rank=rank, world_size=world_size)
        batches = list(DataLoader(dataset, batch_size=2, num_workers=workers))
        lengths.append(sum(len(batch["index"]) for batch in batches))
        for batch in batches:
            assert batch["frames"].shape[1:] == (3, 2, 8, 8)
            for index, frames in zip(batch["index"].tolist(), batch["frames"], strict=True):
                assert torch.equal(frames, alone[index])
                indices[index] += 1
    assert set(indices) == set(range(7))
    assert len(set(lengths)) == 1
    assert sum(lengths) - 7 < world_size * max(workers, 1)


def test_workers_that_outlive_an_epoch_are_told_of_the_next(paths):
    dataset = ClipDataset(paths, num_frames=2, image_size=8)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        orders.append([clip["index"] for clip in loader])
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]


def test_broken_files(paths, tmp_path):
    broken = [*paths[:3], tmp_path / "none.mp4"]
    with pytest.raises(VideoError, match=r"none\.mp4: no such file"):
        list(ClipDataset(broken, image_size=8))
    with pytest.warns(UserWarning, match=r"none\.mp4: no such file; using .*\.mp4 instead"):
        found = list(ClipDataset(broken, image_size=8, on_error="replace"))
    assert len(found) == 4
    assert {clip["index"] for clip in found} == {0, 1, 2}
    with pytest.raises(VideoError, match=r"no such file; all other files of this share \(1\) fail too"):
        list(ClipDataset(broken[3:], image_size=8, on_error="replace"))


def test_options_out_of_range(paths):
    for options, message in (
        ({"num_frames": 0}, "num_frames must be at least 1, not 0"),
        ({"image_size": -1}, "image_size must be at least 1, not -1"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'replace', not 'ignore'"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to 1, not 2"),
    ):
        with pytest.raises(ValueError, match=message):
            ClipDataset(paths, **options)
    with pytest.raises(ValueError, match="there are no files"):
        ClipDataset([])

"""One interface to all decoders: the same frames for each index, within bounded memory."""

import random
import subprocess
import sys

import av
import numpy as np
import pytest
import torch

from mplug2_fast import VideoError
from mplug2_fast.errors import BackendError
from mplug2_fast.ops import preprocess_frames
from mplug2_fast.video import DecodePool, VideoReader, Windows, backends, frame_indices, load_video
from tests.video.clips import decode_all, moving_frames, turn, write_video

CLIPS = [
    ("mp4", "libx264", 30),
    ("mp4", "libx265", 30),
    ("webm", "libvpx-vp9", 30),
    ("mkv", "libvpx", 30),
    ("mp4", "libsvtav1", 30),
    ("avi", "mpeg4", 30),
    ("mkv", "mjpeg", 30),
    ("gif", "gif", 30),
    ("png", "png", 1),
]


def needs(backend):
    reason = backends.reason_not_available(backend)
    return pytest.mark.skipif(reason is not None, reason=f"{backend} is {reason}")


@pytest.mark.parametrize(("extension", "codec", "count"), CLIPS)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_frames_by_index(tmp_path, extension, codec, count, as_bytes):
    path = write_video(tmp_path / f"clip.{extension}", codec, moving_frames(count), gop=7)
    everything = np.stack(decode_all(path))
    with VideoReader(path.read_bytes() if as_bytes else path) as reader:
        assert reader.backend == "pyav"
        assert reader.num_frames == count
        assert reader.size == (80, 96)
        if count > 1:
            assert reader.fps == pytest.approx(25)
            assert reader.duration == pytest.approx(count / 25)
        for indices in ([0], [count - 1], [], [count - 1, 0, count // 2, 0], frame_indices(count, 4), range(count)):
            frames = reader.frames(indices)
            assert frames.dtype == torch.uint8
            assert np.array_equal(frames.numpy(), everything[list(indices)])
        batches = list(reader.batches(batch_size=7))
        assert [len(batch) for batch in batches] == [7] * (count // 7) + [count % 7] * (count % 7 > 0)
        assert np.array_equal(torch.cat(batches).numpy(), everything)
        some = [index for index in (0, 3, 3, 20, 29) if index < count]
        assert np.array_equal(torch.cat(list(reader.batches(some, 2))).numpy(), everything[some])


def test_frames_are_squashed_as_they_are_for_the_model(tmp_path):
    path = write_video(tmp_path / "clip.mp4", "libx264", moving_frames(20))
    frames = VideoReader(path, image_size=24).frames(frame_indices(20, 4))
    assert frames.shape == (4, 24, 24, 3)
    assert torch.equal(preprocess_frames(frames, 24), load_video(path, 4, 24))
    assert VideoReader(path, image_size=24).frames([]).shape == (0, 24, 24, 3)


@pytest.mark.parametrize("backend", ["pyav", pytest.param("torchcodec", marks=needs("torchcodec"))])
def test_frames_are_upright(tmp_path, backend):
    path = write_video(tmp_path / "clip.mp4", "libx265", moving_frames(10))
    lying = VideoReader(path, backend=backend).frames([3, 7])
    turn(path)
    reader = VideoReader(path, backend=backend)
    assert reader.rotation == -90
    assert reader.size == (96, 80)
    assert torch.equal(reader.frames([3, 7]), lying.rot90(-1, (1, 2)))


def test_what_is_not_there(tmp_path):
    path = write_video(tmp_path / "clip.mp4", "libx264", moving_frames(20))
    reader = VideoReader(path)
    for indices in ([20], [-1], [3, 20]):
        with pytest.raises(IndexError, match=r"clip\.mp4: has 20 frames: there is no frame"):
            reader.frames(indices)
    with pytest.raises(ValueError, match="in ascending order"):
        list(reader.batches([3, 2]))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        list(reader.batches(batch_size=0))
    with pytest.raises(VideoError, match=r"none\.mp4: no such file"):
        VideoReader(tmp_path / "none.mp4")
    with pytest.raises(VideoError, match="0 bytes in memory: is empty"):
        VideoReader(b"")
    cut = path.read_bytes()[:-100]
    with pytest.raises(VideoError, match=f"^{len(cut):,} bytes in memory: is truncated"):
        VideoReader(cut)
    with pytest.raises(BackendError, match="unknown video backend 'decord': choose one of pyav, torchcodec"):
        VideoReader(path, backend="decord")


def test_a_backend_that_is_not_there_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(BackendError, match=r"torchcodec is (not installed|cannot be imported).*pip install torchcodec"):
        VideoReader(tmp_path / "clip.mp4", backend="torchcodec")
    assert "pip install torchcodec" in backends.versions()["torchcodec"]
    assert backends.versions()["pyav"] == av.__version__


# What torchcodec decodes is decoded by FFmpeg too, another version of it: bounds for its conversion to RGB.
MAX_DIFFERENCE, MEAN_DIFFERENCE = 3, 0.1


@needs("torchcodec")
@pytest.mark.parametrize(
    ("extension", "codec", "options"),
    [
        ("mp4", "libx265", {}),
        ("mkv", "libx265", {"x265-params": "open-gop=1:bframes=4:log-level=none"}),
        ("webm", "libvpx-vp9", {"deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "12"}),
        ("webm", "libvpx", {}),
    ],
)
def test_torchcodec_gives_the_same_frames(tmp_path, extension, codec, options):
    path = write_video(tmp_path / f"clip.{extension}", codec, moving_frames(40, 130, 94), gop=7, options=options)
    ours, theirs = VideoReader(path), VideoReader(path, backend="torchcodec")
    assert theirs.backend == "torchcodec"
    assert theirs.num_frames == ours.num_frames
    for indices in ([0], [39, 3, 3], frame_indices(40, 16), range(40)):
        expected = ours.frames(indices).int()
        difference = (theirs.frames(indices).int() - expected).abs()
        assert difference.max() <= MAX_DIFFERENCE
        assert difference.float().mean() <= MEAN_DIFFERENCE
    with pytest.raises(IndexError):
        theirs.frames([40])
    squashed = VideoReader(path, backend="torchcodec", image_size=32).frames([5])
    assert (squashed.int() - VideoReader(path, image_size=32).frames([5])).abs().max() <= MAX_DIFFERENCE


@needs("torchcodec")
@pytest.mark.parametrize(
    ("extension", "codec", "reason"),
    [
        ("mp4", "libx264", "it decodes damaged h264 files without an error"),
        ("avi", "mpeg4", "it decodes damaged mpeg4 files without an error"),
        ("ivf", "libvpx-vp9", "the times of its packets do not identify its frames"),
    ],
)
def test_torchcodec_refuses_what_it_does_not_decode_soundly(tmp_path, extension, codec, reason):
    path = write_video(tmp_path / f"clip.{extension}", codec, moving_frames(10))
    with pytest.raises(VideoError, match=f"torchcodec may not decode it: {reason}; use the backend pyav"):
        VideoReader(path, backend="torchcodec").frames([0])


@needs("torchcodec")
@pytest.mark.parametrize(("extension", "codec"), [("mp4", "libx265"), ("webm", "libvpx-vp9"), ("webm", "libvpx")])
def test_torchcodec_does_not_hide_damage_that_pyav_tells(tmp_path, extension, codec):
    path = write_video(tmp_path / f"clip.{extension}", codec, moving_frames(40, 160, 128), gop=10)
    original = np.stack(decode_all(path))
    data = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size > 60]
    told = 0
    for number, (position, size) in enumerate(packets):
        rng = random.Random(number)
        at = position + rng.choice([0, size // 2])
        damaged = bytearray(data)
        damaged[at : position + size] = rng.randbytes(position + size - at)
        try:
            VideoReader(bytes(damaged)).frames(range(40))
        except (VideoError, IndexError):
            told += 1
            try:
                theirs = VideoReader(bytes(damaged), backend="torchcodec").frames(range(40))
            except (VideoError, IndexError):
                continue
            assert (theirs.int() - torch.from_numpy(original)).abs().max() <= MAX_DIFFERENCE, f"packet {number}"
    assert told > 4


@needs("torchcodec")
def test_a_pool_of_torchcodec(tmp_path):
    good = write_video(tmp_path / "clip.webm", "libvpx-vp9", moving_frames(20))
    refused = write_video(tmp_path / "clip.mp4", "libx264", moving_frames(20))
    with DecodePool(1, num_frames=4, image_size=None, backend="torchcodec") as pool:
        found = {clip.index: clip for clip in pool.clips([good, refused])}
    assert found[0].backend == "torchcodec"
    assert found[0].indices == frame_indices(20, 4)
    expected = VideoReader(good).frames(found[0].indices)
    assert (found[0].frames.int() - expected).abs().max() <= MAX_DIFFERENCE
    assert "torchcodec may not decode it" in str(found[1].error)
    with DecodePool(1, image_size=None, backend="torchcodec", windows=Windows(8, 8)) as pool:
        assert [clip.indices[0] for clip in pool.clips([good])] == [0, 8, 16]


PEAK = """
import re
from mplug2_fast.video import VideoReader, load_video

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

load_video({warm_up!r}, 2, 32)
before = peak()
{code}
print(peak() - before >> 10)
"""


def megabytes_at_peak(code, warm_up):
    """Peak memory of a process that runs some code, over what it takes to load a small video."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK.format(code=code, warm_up=str(warm_up))],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return int(done.stdout)


def test_two_hours_sampled_once_a_second_take_little_memory(tmp_path):
    """120 MB of video, five frames a second: two seconds encoded, and their packets repeated."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(10)]
    start = write_video(tmp_path / "start.mp4", "libx264", noise, gop=10, options={"bf": "0", "qp": "20"})
    path = tmp_path / "long.mp4"
    with av.open(str(start)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        ticks = packets[1].pts - packets[0].pts
        for index in range(36_000):
            packet = packets[index % 10]
            packet.pts = packet.dts = index * ticks
            packet.stream = stream
            target.mux(packet)
    assert path.stat().st_size > 100e6
    code = f"""
reader = VideoReader({str(path)!r}, image_size=56)
assert reader.num_frames == 36_000
count = sum(len(batch) for batch in reader.batches(range(0, 36_000, 5)))
assert count == 7_200
"""
    assert megabytes_at_peak(code, start) < 60


def test_frames_of_7680_by_4320_are_not_held(tmp_path):
    """Five frames of 100 MB each."""
    small = write_video(tmp_path / "small.mkv", "mjpeg", moving_frames(2))
    frame = np.zeros((4320, 7680, 3), np.uint8)
    frame[:2000, :3000] = 200
    path = write_video(tmp_path / "huge.mkv", "mjpeg", [frame] * 5)
    code = f"assert load_video({str(path)!r}, 5, 224).shape == (3, 5, 224, 224)"
    assert megabytes_at_peak(code, small) < 400

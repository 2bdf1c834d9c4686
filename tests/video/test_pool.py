"""The pool of decoding processes: the frames of decoding here, and nothing is lost with a worker."""

import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import mplug2_fast as mf
from mplug2_fast.errors import BackendError
from mplug2_fast.ops import preprocess_frames
from mplug2_fast.video import DecodePool, Windows, frame_indices, load_video, read_frames
from mplug2_fast.video.worker import Worker
from tests.video.clips import decode_all, moving_frames, write_video


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    frames = moving_frames(30)
    return [
        write_video(folder / "a.mp4", "libx264", frames, gop=5),
        write_video(folder / "b.mkv", "mjpeg", frames[:3]),
        write_video(folder / "c.webm", "libvpx-vp9", frames[:21]),
        write_video(folder / "d ä.avi", "mpeg4", frames[:17]),
    ]


def by_index(found):
    found = list(found)
    assert len({clip.index for clip in found}) == len(found)
    return {clip.index: clip for clip in found}


def test_the_frames_of_decoding_here(clips):
    with DecodePool(2, num_frames=5, image_size=32) as pool:
        for _ in range(2):  # a pool serves one list after the other
            found = by_index(pool.clips(clips))
            assert sorted(found) == [0, 1, 2, 3]
            for index, path in enumerate(clips):
                clip = found[index]
                assert clip.error is None
                assert clip.source == path
                assert clip.backend == "pyav"
                assert clip.seconds > 0
                assert clip.last
                assert clip.indices == frame_indices(len(decode_all(path)), 5)
                assert torch.equal(clip.frames, load_video(path, 5, 32))


def test_pixels_as_they_are_or_squashed_or_of_another_dtype(clips):
    with DecodePool(1, num_frames=4, image_size=None) as pool:
        (clip,) = pool.clips(clips[:1])
        assert torch.equal(clip.frames, read_frames(clips[0], 4))
    with DecodePool(1, num_frames=4, image_size=24, dtype=torch.uint8) as pool:
        (clip,) = pool.clips(clips[:1])
        assert clip.frames.shape == (4, 24, 24, 3)
        assert torch.equal(preprocess_frames(clip.frames, 24), load_video(clips[0], 4, 24))
    with DecodePool(1, num_frames=4, image_size=24, dtype=torch.bfloat16) as pool:
        (clip,) = pool.clips(clips[:1])
        assert torch.equal(clip.frames, preprocess_frames(read_frames(clips[0], 4), 24, torch.bfloat16))


def test_bytes_are_a_file(clips):
    with DecodePool(2, num_frames=3, image_size=16) as pool:
        found = by_index(pool.clips([clips[0].read_bytes(), b"", clips[2].read_bytes(), b"x" * 100]))
    assert torch.equal(found[0].frames, load_video(clips[0], 3, 16))
    assert torch.equal(found[2].frames, load_video(clips[2], 3, 16))
    assert str(found[1].error) == "0 bytes in memory: is empty"
    assert str(found[3].error).startswith("100 bytes in memory: is not a video or image that can be read")


def test_errors_are_those_of_decoding_here(clips, tmp_path):
    truncated = tmp_path / "cut.mp4"
    truncated.write_bytes(clips[0].read_bytes()[:-500])
    bad = [tmp_path / "none.mp4", tmp_path, truncated, f"{tmp_path}/nul\0.mp4", tmp_path / ("long" * 20_000)]
    with DecodePool(2, num_frames=2, image_size=8) as pool:
        found = by_index(pool.clips([clips[0], *bad, clips[1]]))
    assert len(found) == len(bad) + 2
    for index, path in enumerate(bad, start=1):
        assert isinstance(found[index].error, mf.VideoError)
        assert found[index].frames is None
        with pytest.raises(mf.VideoError) as expected:
            load_video(path, 2, 8)
        assert str(found[index].error) == str(expected.value)
    assert found[0].error is None
    assert found[len(bad) + 1].error is None


def test_a_path_without_end_costs_nothing_else(clips):
    with DecodePool(1, num_frames=2, image_size=8) as pool:
        found = by_index(pool.clips(["x" * 1_000_000, clips[0]]))
    assert str(found[0].error).endswith("x: cannot be sent to a decoder: Message too long")
    assert found[1].error is None


@pytest.mark.parametrize(
    ("length", "stride"), [(16, 16), (4, 4), (5, 2), (1, 1), (3, 7), (30, 1), (40, 7), (7, 23), (2, 28), (2, 29)]
)
def test_windows(clips, length, stride):
    everything = np.stack(decode_all(clips[0]))
    total = len(everything)
    expected, first = [], 0
    while first < total and (first == 0 or first - stride + length < total):
        expected.append([min(index, total - 1) for index in range(first, first + length)])
        first += stride
    with DecodePool(1, image_size=None, windows=Windows(length, stride)) as pool:
        found = list(pool.clips(clips[:1]))
    assert [clip.indices for clip in found] == expected
    assert [clip.window for clip in found] == list(range(len(expected)))
    assert [clip.last for clip in found] == [False] * (len(expected) - 1) + [True]
    for clip in found:
        assert np.array_equal(clip.frames.numpy(), everything[clip.indices])


def test_windows_of_many_files_come_in_order_and_errors_come_last(clips, tmp_path):
    data = bytearray(clips[1].read_bytes())
    broken = tmp_path / "broken.mkv"
    broken.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with DecodePool(2, image_size=16, windows=Windows(4, 4), prefetch=1) as pool:
        found = list(pool.clips([*clips, broken, tmp_path / "none", *clips]))
    for index in range(10):
        of_file = [clip for clip in found if clip.index == index]
        assert [clip.last for clip in of_file] == [False] * (len(of_file) - 1) + [True]
        assert [clip.window for clip in of_file if clip.error is None] == list(range(len(of_file)))[
            : len(of_file) - (of_file[-1].error is not None)
        ]
        assert (of_file[-1].error is not None) == (index in (4, 5))


def test_a_hanging_worker_costs_its_file_only(clips):
    with DecodePool(1, timeout=1.0, num_frames=2, image_size=8) as pool:
        list(pool.clips(clips[:1]))
        (pid,) = pool.pids
        os.kill(pid, signal.SIGSTOP)
        found = by_index(pool.clips(clips))
        assert pool.pids != [pid]
    assert str(found[0].error) == f"{clips[0]}: takes too long: decoding was stopped after 1 s"
    assert found[0].seconds >= 1
    assert all(found[index].error is None for index in (1, 2, 3))


def test_a_hanging_worker_whose_socket_is_full_is_ended_too(clips):
    with DecodePool(1, timeout=1.0, num_frames=2, image_size=8) as pool:
        list(pool.clips(clips[:1]))
        (worker,) = pool._supervisor._queues
        os.kill(worker.pid, signal.SIGSTOP)
        longest = "x" * (worker.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - 100)
        found = by_index(pool.clips([longest, longest, clips[0]]))
    assert str(found[0].error).endswith("takes too long: decoding was stopped after 1 s")
    assert "takes too long" not in str(found[1].error)
    assert found[2].error is None


def test_what_a_worker_answered_before_it_died_counts():
    worker = Worker.__new__(Worker)
    worker.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with worker.socket, theirs:
        worker.start("a file that it never begins with")
        theirs.send(b'{"error": "is empty"}')
        theirs.close()
        assert worker.receive() == {"error": "is empty"}
        assert worker.receive() is None


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL", "SIGABRT"])
def test_a_dying_worker_costs_its_file_only(clips, name):
    with DecodePool(1, num_frames=2, image_size=8) as pool:
        list(pool.clips(clips[:1]))
        (pid,) = pool.pids
        os.kill(pid, signal.SIGSTOP)

        def kill_at_work():
            while not any(len(queue.tasks) == 2 for queue in pool._supervisor._queues.values()):
                time.sleep(0.01)
            os.kill(pid, getattr(signal, name))
            os.kill(pid, signal.SIGCONT)

        killer = threading.Thread(target=kill_at_work)
        killer.start()
        found = by_index(pool.clips(clips))
        killer.join()
    assert str(found[0].error).startswith(f"{clips[0]}: its decoder died ({name}")
    assert all(found[index].error is None for index in (1, 2, 3))


def test_a_worker_that_dies_idle_costs_nothing(clips):
    with DecodePool(2, num_frames=2, image_size=8) as pool:
        assert all(clip.error is None for clip in pool.clips(clips))
        pids = pool.pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while set(pids) & set(pool.pids):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        found = by_index(pool.clips(clips * 3))
    assert len(found) == 12
    assert all(clip.error is None for clip in found.values())


def test_a_file_is_not_to_blame_for_a_worker_that_was_dead_before(clips):
    with DecodePool(1, num_frames=2, image_size=8) as pool:
        list(pool.clips(clips[:1]))
        (worker,) = pool._supervisor._queues
        # The worker's death goes unheard, as in the moment between it and the supervisor's waking up.
        pool._supervisor._selector.unregister(worker.socket)
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        found = pool.clips(clips)
        feeder = threading.Thread(target=lambda: drawn.append(next(found)), daemon=True)
        drawn = []
        feeder.start()
        time.sleep(0.5)
        pool._supervisor._selector.register(worker.socket, selectors.EVENT_READ, worker)
        pool._supervisor._wake()
        feeder.join(60)
        assert all(clip.error is None for clip in [*drawn, *found])


def test_decoding_goes_on_ahead_but_not_without_bounds(clips):
    drawn = []

    def sources():
        for number in range(100):
            drawn.append(number)
            yield clips[number % 4]

    with DecodePool(2, num_frames=2, image_size=8, prefetch=2) as pool:
        found = pool.clips(sources())
        next(found)
        deadline = time.monotonic() + 60
        while len(pool._supervisor._ready) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(pool._supervisor._ready) == 4
        assert len(drawn) <= 1 + 4 + 4
        found.close()
        assert len(by_index(pool.clips(clips))) == 4  # nothing of the list before comes after


def test_stopping_early_within_a_file_of_windows(clips):
    with DecodePool(1, image_size=8, windows=Windows(2, 1), prefetch=1) as pool:
        for _ in range(3):
            found = pool.clips(clips)
            assert [next(found).window for _ in range(3)] == [0, 1, 2]
            found.close()
        assert {clip.index for clip in pool.clips(clips)} == {0, 1, 2, 3}


def test_nothing_is_left_behind(clips):
    with DecodePool(2, num_frames=2, image_size=8) as pool:
        kept = next(pool.clips(clips))
        before = kept.frames.clone()
        pids = pool.pids
        descriptors = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            list(pool.clips(clips))
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
    assert torch.equal(kept.frames, before)
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()


def test_workers_do_not_outlive_a_parent_that_is_killed(clips):
    code = f"""
from mplug2_fast.video import DecodePool
with DecodePool(2) as pool:
    found = pool.clips([{str(clips[0])!r}] * 10)
    next(found)
    print(*pool.pids, flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_workers_need_neither_torch_nor_a_guarded_main_module(clips, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
from pathlib import Path
from mplug2_fast.video import DecodePool
with DecodePool(1, num_frames=2, image_size=8) as pool:
    print(*[clip.index for clip in pool.clips([{str(clips[0])!r}])])
    print("libtorch" in Path(f"/proc/{{pool.pids[0]}}/maps").read_text())
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["0", "False"]
    assert done.stderr == ""


def test_a_pool_that_cannot_start_says_why(clips, monkeypatch, tmp_path):
    (tmp_path / "av.py").write_text("raise ImportError('no libraries')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with DecodePool(1) as pool, pytest.raises(RuntimeError, match=r"(?s)cannot start.*no libraries.*pip install av"):
        list(pool.clips(clips))


def test_misuse(clips):
    pool = DecodePool(1)
    with pytest.raises(RuntimeError, match="use a DecodePool in a with statement"):
        next(pool.clips(clips))
    with pool:
        found = pool.clips(clips)
        next(found)
        with pytest.raises(RuntimeError, match="another iteration of this DecodePool has not ended"):
            next(pool.clips(clips))
        found.close()
        with pytest.raises(TypeError, match="a source is a path or the bytes of a file, not int"):
            list(pool.clips([clips[0], 3]))
        assert list(pool.clips([])) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "num_workers must be a whole number, at least 1, not 0"),
        ({"num_frames": 0}, "num_frames must be"),
        ({"num_frames": 2.0}, "num_frames must be"),
        ({"image_size": 0}, "image_size must be"),
        ({"prefetch": 0}, "prefetch must be"),
        ({"threads": 0}, "threads must be"),
        ({"timeout": 0}, "timeout must be a positive number"),
        ({"dtype": torch.int32}, "dtype must be"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DecodePool(**{"num_workers": 1, **options})
    with pytest.raises(BackendError, match="unknown video backend 'magic': choose one of pyav, torchcodec"):
        DecodePool(1, backend="magic")
    for name in ("length", "stride"):
        with pytest.raises(ValueError, match=f"{name} of the windows must be"):
            Windows(**{name: 0})

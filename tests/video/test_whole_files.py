"""Unusual but intact files: the same frames as ffmpeg's, upright and in the same size."""

import random
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from mplug2_fast import VideoError
from mplug2_fast.video import ClipDataset, VideoReader, load_video, read_frames
from tests.video.clips import decode_all, moving_frames, write_video

DATA = Path(__file__).parent / "data"


def frames_of(source):
    """All frames, decoded in three ways that must agree on their number."""
    reader = VideoReader(source)
    frames = np.concatenate([batch.numpy() for batch in reader.batches()])
    assert len(frames) == reader.num_frames
    assert frames.shape[1:3] == reader.size
    return frames


# How pixels are laid out for each EXIF orientation, and for the display matrix that says the same.
UPRIGHT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, 1),
}
MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_videos_are_upright(tmp_path, orientation):
    path = write_video(tmp_path / "clip.mp4", "libx264", moving_frames(6))
    lying = frames_of(path)
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in MATRICES[orientation])
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    frames = frames_of(path)
    assert np.array_equal(frames, np.stack([UPRIGHT[orientation](frame) for frame in lying]))
    reader = VideoReader(path)
    turned = np.rot90(lying[0], reader.rotation // 90)
    assert np.array_equal(turned[:, ::-1] if reader.mirrored else turned, frames[0])


def exif(orientation):
    return b"MM\0*\0\0\0\x08\0\1" + struct.pack(">HHIHHI", 274, 3, 1, orientation, 0, 0)


def with_exif_in_jpeg(data, orientation):
    contents = b"Exif\0\0" + exif(orientation)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(contents)) + contents + data[2:]


def with_exif_in_png(data, orientation):
    contents = b"eXIf" + exif(orientation)
    return (
        data[:33]
        + struct.pack(">I", len(contents) - 4)
        + contents
        + zlib.crc32(contents).to_bytes(4, "big")
        + data[33:]
    )


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("extension", "codec", "add"), [("jpg", "mjpeg", with_exif_in_jpeg), ("png", "png", with_exif_in_png)]
)
def test_pictures_are_upright(tmp_path, extension, codec, add, orientation):
    path = write_video(tmp_path / f"still.{extension}", codec, moving_frames(1))
    lying = frames_of(path)[0]
    data = add(path.read_bytes(), orientation)
    path.write_bytes(data)
    for source in (path, data):
        assert np.array_equal(frames_of(source)[0], UPRIGHT[orientation](lying))


def test_an_angle_between_quarter_turns_is_an_error(tmp_path):
    path = write_video(tmp_path / "clip.mp4", "libx264", moving_frames(2))
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 20] = struct.pack(">5i", 46341, 46341, 0, -46341, 46341)
    path.write_bytes(data)
    with pytest.raises(VideoError, match="requires a rotation by 45 degrees; only quarter turns are supported"):
        load_video(path, 2, 32)


@pytest.mark.parametrize("extension", ["mp4", "mkv"])
def test_a_preview_that_is_the_first_stream_is_not_the_video(tmp_path, extension):
    path = tmp_path / f"clip.{extension}"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream(codec, rate=25) for codec in ("mjpeg", "libx264")]
        for stream, (width, height), pixels in zip(streams, ((48, 40), (96, 80)), ("yuvj420p", "yuv420p"), strict=True):
            stream.width, stream.height, stream.pix_fmt = width, height, pixels
            stream.codec_context.thread_count = 1
        streams[0].disposition = Disposition(0)
        streams[1].disposition = Disposition.default
        for stream, frames in zip(streams, (moving_frames(1, 48, 40), moving_frames(20)), strict=True):
            for index, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts = index
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    assert frames_of(path).shape == (20, 80, 96, 3)


def test_two_fields_are_one_frame():
    assert frames_of(DATA / "fields.mp4").shape == (3, 64, 64, 3)


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_joined_transport_streams_are_whole(tmp_path, codec):
    first = write_video(tmp_path / "first.ts", codec, moving_frames(20)).read_bytes()
    second = write_video(tmp_path / "second.ts", codec, moving_frames(15)).read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(first + second + first)
    assert len(frames_of(path)) == 55
    assert load_video(path, 4, 32).shape == (3, 4, 32, 32)
    packets = [first[at : at + 188] for at in range(0, len(first), 188)]
    pictures = [index for index, packet in enumerate(packets) if packet[1:3] == b"\x01\x00"]  # within a picture
    del packets[pictures[len(pictures) // 2]]
    path.write_bytes(b"".join(packets) + second)
    with pytest.raises(VideoError, match="is corrupt or truncated: a packet is incomplete"):
        load_video(path, 4, 32)


def avi_forms(data):
    """An AVI file as careless programs, or recordings into a pipe, write it."""
    movi = data.index(b"movi") - 8
    size = struct.unpack_from("<I", data, movi + 4)[0]
    index = movi + 8 + size
    with_zeros = data[:index] + bytes(4) + data[index:]
    yield "zeros before the index", with_zeros[:4] + struct.pack("<I", len(with_zeros) - 8) + with_zeros[8:]
    for more in (8, 4096):
        yield f"size {more} too large", data[:4] + struct.pack("<I", len(data) - 8 + more) + data[8:]
    for unknown in (0, 2**32 - 1):
        size = struct.pack("<I", unknown)
        opened = data[:4] + size + data[8 : movi + 4] + size + data[movi + 8 : index]
        flags = opened.index(b"avih") + 8 + 12
        yield f"open with {unknown}", opened[:flags] + bytes(4) + opened[flags + 4 :]


def test_avi_files_written_without_care_are_whole(tmp_path):
    path = write_video(tmp_path / "clip.avi", "mpeg4", moving_frames(24))
    expected = frames_of(path)
    for name, data in avi_forms(path.read_bytes()):
        path.write_bytes(data)
        assert np.array_equal(frames_of(path), expected), name
        assert np.array_equal(frames_of(data), expected), name


def test_a_jpeg_file_with_a_second_picture_is_one_frame(tmp_path):
    first = write_video(tmp_path / "first.jpg", "mjpeg", moving_frames(1)).read_bytes()
    second = write_video(tmp_path / "second.jpg", "mjpeg", moving_frames(1, 48, 40)).read_bytes()
    listed = first[:2] + b"\xff\xe2" + struct.pack(">H", 10) + b"MPF\0II*\0" + first[2:]
    for number, data in enumerate((first + second, listed + first, listed + second, first + bytes(100))):
        for name in (f"{number}.jpg", f"{number}", f"{number}.mp4"):
            (tmp_path / name).write_bytes(data)
            assert frames_of(tmp_path / name).shape == (1, 80, 96, 3), name
        assert frames_of(data).shape == (1, 80, 96, 3)
    stream = write_video(tmp_path / "clip.mjpeg", "mjpeg", moving_frames(5), format="mjpeg")
    assert len(frames_of(stream)) == len(frames_of(stream.read_bytes())) == 5


def test_colours_that_cannot_be_converted_are_an_error_of_one_line(tmp_path):
    odd = {"x264-params": "colormatrix=YCgCo", "mbtree": "0"}
    path = write_video(tmp_path / "odd.mp4", "libx264", moving_frames(6), options=odd)
    good = write_video(tmp_path / "good.mp4", "libx264", moving_frames(6))
    for read in (lambda: load_video(path, 4, 32), lambda: VideoReader(path).size, lambda: read_frames(path, 2)):
        with pytest.raises(VideoError, match=r"odd\.mp4: its colours cannot be converted to RGB"):
            read()
    dataset = ClipDataset([path, good], num_frames=4, image_size=32, on_error="replace")
    with pytest.warns(UserWarning, match=r"using .*good\.mp4 instead"):
        assert [clip["index"] for clip in dataset] == [1, 1]


@pytest.mark.parametrize(("extension", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx")])
def test_rate_and_duration_follow_from_times(tmp_path, extension, codec):
    times = [0, 2000, 2040, 2080, 2120, 9000, 12_000, 12_040]
    path = write_video(tmp_path / f"clip.{extension}", codec, moving_frames(8), milliseconds=times)
    reader = VideoReader(path)
    assert reader.times == pytest.approx([time / 1000 for time in times], abs=0.002)
    assert 12.04 <= reader.duration <= 12.04 + 3
    assert reader.fps == pytest.approx(8 / reader.duration)
    assert reader.indices_at([0, 1.9, 2.01, 5, 9.5, 100]) == [0, 0, 1, 4, 5, 7]


def test_times_of_files_whose_packets_do_not_tell_them(tmp_path):
    for extension, codec in (("avi", "mpeg4"), ("gif", "gif"), ("h264", "libx264")):
        path = write_video(tmp_path / f"clip.{extension}", codec, moving_frames(10))
        reader = VideoReader(path)
        assert reader.duration == pytest.approx(0.4, rel=0.05)
        assert len(reader.times) == 10
        assert reader.indices_at([0, 0.21, 5]) == [0, 5, 9]


@pytest.mark.parametrize("extension", ["mkv", "mp4"])
def test_frames_are_cropped_as_the_container_asks_for(extension):
    path = DATA / f"crop.{extension}"
    whole = np.stack(decode_all(path))
    assert whole.shape[1:3] == (96, 160)
    assert np.array_equal(frames_of(path), whole[:, 16:80, 24:152])


def test_frames_of_another_size_are_squashed_too(tmp_path):
    small = write_video(tmp_path / "small.h264", "libx264", moving_frames(10, 96, 80))
    large = write_video(tmp_path / "large.h264", "libx264", moving_frames(10, 128, 96))
    path = tmp_path / "both.h264"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    clips = [load_video(p, 10, 32) for p in (small, large, path)]
    assert load_video(path, 20, 32)[:, :10].equal(clips[0])
    assert load_video(path, 20, 32)[:, 10:].equal(clips[1])
    with pytest.raises(VideoError, match=r"frames change size within the video \(96x80 and 128x96\)"):
        read_frames(path, 4)


def test_damage_is_still_noticed_in_joined_streams(tmp_path):
    data = bytearray(write_video(tmp_path / "clip.ts", "libx264", moving_frames(30)).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = random.Random(0).randbytes(400)
    path = tmp_path / "damaged.ts"
    path.write_bytes(data + data)
    with pytest.raises(VideoError, match="is corrupt"):
        load_video(path, 4, 32)

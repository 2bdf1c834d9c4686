"""Makes videos for tests, with frames that can be told apart."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE = 25

# Quiet, fast, fine enough to tell a frame from its neighbours, and the same bytes every time: x264's macroblock tree
# comes out differently from run to run where a frame is only a few blocks wide.
OPTIONS = {
    "libx264": {"mbtree": "0"},
    "libx265": {"x265-params": "log-level=none"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "12"},
    "mpeg4": {"b": "2M"},
    "snow": {"b": "2M"},
}
PIXEL_FORMATS = {
    "mjpeg": "yuvj420p",
    "prores_ks": "yuv422p10le",
    "gif": "rgb8",
    "huffyuv": "rgb24",
    "qtrle": "rgb24",
    "jpeg2000": "rgb24",
    "apng": "rgb24",
    "png": "rgb24",
    "tiff": "rgb24",
    "bmp": "bgr24",
    "zlib": "bgr24",
    "cinepak": "rgb24",
    "magicyuv": "gbrp",
}


def moving_frames(count: int, width: int = 96, height: int = 80) -> list[np.ndarray]:
    """Moving coloured blocks, and a patch whose grey level is the number of the frame."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    picture = blocks.repeat(8, axis=0).repeat(8, axis=1)
    frames = []
    for index in range(count):
        frame = np.roll(picture, 3 * index, axis=1)
        frame[8:40, 8:40] = index * 8 % 256
        frames.append(frame)
    return frames


def write_video(
    path: Path,
    codec: str,
    frames: Sequence[np.ndarray],
    *,
    gop: int = 12,
    options: dict[str, str] | None = None,
    milliseconds: Iterable[int] | None = None,
    container_options: dict[str, str] | None = None,
    format: str | None = None,
) -> Path:
    """Encodes frames, at 25 a second or at the given times."""
    times = None if milliseconds is None else list(milliseconds)
    options_of_container = {"fflags": "bitexact", **(container_options or {})}  # no random ids
    with av.open(str(path), "w", format=format, options=options_of_container) as container:
        stream = container.add_stream(codec, rate=RATE, options={**OPTIONS.get(codec, {}), **(options or {})})
        stream.height, stream.width = frames[0].shape[:2] if frames else (80, 96)
        stream.pix_fmt = PIXEL_FORMATS.get(codec, "yuv420p")
        stream.gop_size = gop
        # libvpx's threads spin while they wait for one another: on a busy machine, for minutes.
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        container.start_encoding()
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index if times is None else times[index]
            frame.time_base = Fraction(1, RATE) if times is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if hasattr(os, "sched_setscheduler"):  # SVT-AV1 leaves the thread, where it may, at the highest priority there is
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


def write_sound(path: Path, codec: str) -> Path:
    """Encodes half a second of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=44100, layout="mono")
        samples = np.zeros((1, 22050), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 44100
        for resampled in av.AudioResampler(format=stream.format, layout="mono", rate=44100).resample(frame):
            container.mux(stream.encode(resampled))
        container.mux(stream.encode(None))
    return path


def decode_all(path: Path) -> list[np.ndarray]:
    """Decodes every frame of a video, in the simplest way."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def turn(path: Path) -> None:
    """Adds a rotation to the track's matrix of an mp4 file, as phones do."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)

"""Chosen frames of a file, decoded with PyAV: the whole file, or only the parts that are needed.

The packets are read once without decoding, which is cheap. From them follow the number of frames, which headers may
get wrong, and what it costs to decode only the parts in which the chosen frames lie (`mplug2_fast.video.seek`). Where
that is less, it is done, and checked; in every other case the file is decoded from its first packet to its last, and
frames are counted as they come. Both ways give the same frames.

Damage is an error wherever the container, a packet or the decoder shows it. Parts that are passed over are not looked
at by the decoder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np

from mplug2_fast.errors import VideoError
from mplug2_fast.video.files import reason_not_readable
from mplug2_fast.video.matroska import DamagedError, find_blocks
from mplug2_fast.video.pixels import squash
from mplug2_fast.video.seek import (
    CannotSeekError,
    PacketInfo,
    Scan,
    decode_segments,
    is_fresh_start,
    is_shown,
    plan_segments,
)

try:
    import av
    from av.container import InputContainer
    from av.stream import Disposition
    from av.video.reformatter import VideoReformatter
    from av.video.stream import VideoStream
except ImportError as error:
    raise ImportError("reading video files needs PyAV: pip install av") from error

Choice = Callable[[int], Sequence[int]]
"""From the number of frames in the file to the indices to take."""

# Formats in which libav draws pictures of text, or follows a text to other files.
_NOT_VIDEO_FORMATS = frozenset(("tty", "hls", "concat", "dash", "sdp"))
_FORMAT_OPTIONS = {"protocol_whitelist": "file", "pattern_type": "none"}
# This decoder paints over damage without a word, unless told not to. Others must not be told: they take offence at
# files that are merely unusual.
_DECODER_OPTIONS = {"mjpeg": {"err_detect": "explode"}}
# These decoders paint over damage too, and tell by a flag of the frame. With frames decoded side by side, a frame may
# be handed out before its flags are set; with slices side by side, much damage is not noticed at all.
_ONE_THREAD = frozenset(("h264", "mpeg4", "rv30", "rv40"))


def decode_frames(
    path: str | os.PathLike[str],
    choose: Choice,
    *,
    may_seek: bool = True,
    threads: int | None = None,
    image_size: int | None = None,
) -> list[np.ndarray]:
    """The chosen frames of a video or image file.

    Args:
        path: the file.
        choose: from the number of frames to the indices to take.
        may_seek: False decodes everything.
        threads: for decoding and for conversion to RGB; None takes as many as torch does.
        image_size: height and width that each frame is squashed to as soon as it is decoded, by the rule of
            `mplug2_fast.ops.preprocess_frames`; None leaves them as they are.

    Returns:
        one array for each index, (height, width, 3), uint8, RGB, upright.

    Raises:
        VideoError: the file cannot be read or decoded, or the chosen frames differ in size.
    """
    name = os.fsdecode(path)
    return decode_scanned(
        name, scan_packets(name), choose, may_seek=may_seek, threads=usual_threads(threads), image_size=image_size
    )


def decode_scanned(
    name: str, scan: Scan, choose: Choice, *, may_seek: bool = True, threads: int, image_size: int | None
) -> list[np.ndarray]:
    """`decode_frames` of a file whose packets are known."""
    indices = choose(max(scan.shown, 1))
    plan = plan_segments(scan, indices, _threads(scan.codec, threads)) if may_seek else None
    if plan is not None:
        segments, times = plan
        convert = _Converter(name, image_size, threads)
        try:
            with _open(name, threads) as (container, stream):
                found = dict(decode_segments(container, stream, scan, segments, convert))
            return [found[time] for time in times]
        except (CannotSeekError, av.FFmpegError):
            pass  # decoding everything tells whether the file is at fault
    count, found = _decode_all(name, indices, threads, image_size)
    if count != scan.shown:
        indices = choose(count)
        _, found = _decode_all(name, indices, threads, image_size)
        if not found.keys() >= set(indices):
            raise _error(name, "does not decode to the same frames twice")
    return [found[index] for index in indices]


def stream_scanned(
    name: str, scan: Scan, indices: list[int], *, threads: int, image_size: int | None
) -> Iterator[np.ndarray]:
    """The frames with these indices, in ascending order, as they are decoded: none is held.

    Raises:
        VideoError: as in `decode_frames`, perhaps after frames that were good; or there are fewer frames.
    """
    plan = plan_segments(scan, indices, _threads(scan.codec, threads)) if indices else None
    convert = _Converter(name, image_size, threads)
    done = 0
    if plan is not None:
        segments, times = plan
        with suppress(CannotSeekError, av.FFmpegError), _open(name, threads) as (container, stream):
            for time, pixels in decode_segments(container, stream, scan, segments, convert):
                while done < len(times) and times[done] == time:
                    yield pixels
                    done += 1
            if done == len(times):
                return
    count = 0
    for frame in _every_frame(name, threads):
        if indices[done : done + 1] == [count]:
            pixels = convert(frame)
            while indices[done : done + 1] == [count]:
                yield pixels
                done += 1
        count += 1
    if done < len(indices):
        raise _error(name, f"has only {count:,} frames: there is no frame {indices[done]:,}")


def iterate_frames(
    path: str | os.PathLike[str], *, threads: int | None = None, image_size: int | None = None
) -> Iterator[np.ndarray]:
    """Every frame of a file in order, as it is decoded: the arguments, arrays and errors of `decode_frames`.

    An error may come after frames that were good.
    """
    name = os.fsdecode(path)
    scan_packets(name)
    threads = usual_threads(threads)
    convert = _Converter(name, image_size, threads)
    for frame in _every_frame(name, threads):
        yield convert(frame)


def count_frames(name: str, scan: Scan, threads: int) -> int:
    """The number of frames: what the packets tell where they can be trusted, or what decoding everything gives."""
    return scan.shown if scan.one_frame_a_packet else sum(1 for _ in _every_frame(name, threads))


def scan_packets(name: str) -> Scan:
    """All packets of a file that is whole as far as can be told without decoding.

    Raises:
        VideoError: it is not, or has no packets.
    """
    if reason := reason_not_readable(name):
        raise _error(name, reason)
    scan = _scan(name)
    if not scan.packets:
        raise _error(name, "has no frames")
    return scan


def rotation(name: str) -> int:
    """Degrees by which the frames of a file are turned to be upright, counterclockwise."""
    return next(_every_frame(name, 1)).rotation


def _scan(name: str) -> Scan:
    """Reads all packets of the video stream without decoding them."""
    with _errors_of(name, "is corrupt: its packets cannot be read"), _open(name, 1) as (container, stream):
        codec = stream.codec_context.codec.canonical_name
        scan = Scan(
            container.format.name,
            codec,
            fps=None if stream.average_rate is None else float(stream.average_rate),
            seconds_a_tick=None if stream.time_base is None else float(stream.time_base),
        )
        blocks = _blocks(name) if scan.format == "matroska,webm" else {}
        tracks = set()
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.is_corrupt:
                raise _error(name, "is corrupt or truncated: a packet is incomplete")
            tracks.add(blocks.pop(packet.pos, None))
            fresh_start = is_fresh_start(packet, codec, stream.codec_context.extradata)
            scan.packets.append(PacketInfo(packet.pts, packet.size, fresh_start, is_shown(packet, codec)))
            scan.changes |= packet.has_sidedata("new_extradata")
    for position, track in blocks.items():
        if track in tracks:
            raise _error(name, f"is corrupt: the block at byte {position:,} cannot be read")
    return scan


def _blocks(name: str) -> dict[int, int]:
    """The position and track of each block of a Matroska file, from its structure."""
    try:
        with open(name, "rb") as file:
            return find_blocks(file, os.fstat(file.fileno()).st_size)
    except DamagedError as error:
        raise _error(name, f"is corrupt: {error}") from None


def _decode_all(
    name: str, indices: Sequence[int], threads: int, image_size: int | None
) -> tuple[int, dict[int, np.ndarray]]:
    """The number of frames in the file, and those with these indices."""
    wanted, found, count = set(indices), {}, 0
    convert = _Converter(name, image_size, threads)
    for frame in _every_frame(name, threads):
        if count in wanted:
            found[count] = convert(frame)
        count += 1
    return count, found


def _every_frame(name: str, threads: int) -> Iterator[av.VideoFrame]:
    empty = True
    with _errors_of(name, "is corrupt: it cannot be decoded"), _open(name, threads) as (container, stream):
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise _error(name, "is corrupt: the decoder reports a damaged frame")
            empty = False
            yield frame
    if empty:
        raise _error(name, "has no frames")


class _Converter:
    """From decoded frames to upright RGB arrays; what it sets up for a size and pixel format serves the next frame."""

    def __init__(self, name: str, image_size: int | None, threads: int) -> None:
        self._name = name
        self._image_size = image_size
        self._threads = threads
        self._sizes: set[tuple[int, int]] = set()
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        pixels = self._reformatter.reformat(frame, format="rgb24", threads=self._threads).to_ndarray()
        pixels = np.rot90(pixels, round(frame.rotation / 90))
        self._sizes.add(pixels.shape[:2])
        if len(self._sizes) > 1:
            sizes = " and ".join(f"{width}x{height}" for height, width in sorted(self._sizes))
            raise _error(self._name, f"frames change size within the video ({sizes})")
        return pixels if self._image_size is None else squash(pixels, self._image_size)


def usual_threads(threads: int | None) -> int:
    """The number given, or as many as torch takes."""
    if threads is not None:
        return threads
    import torch

    return torch.get_num_threads()


def _threads(codec: str, threads: int) -> int:
    return 1 if codec in _ONE_THREAD else threads


@contextmanager
def _open(name: str, threads: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and its video stream, ready to decode."""
    not_readable = "is not a video or image that can be read"
    with _errors_of(name, not_readable):
        container = av.open(f"file:{name}", options=_FORMAT_OPTIONS, metadata_errors="replace")
    with container:
        if container.format.name in _NOT_VIDEO_FORMATS:
            raise _error(name, f"{not_readable} (it is taken for {container.format.long_name})")
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise _error(name, "has no video stream" + (", only audio" if container.streams.audio else ""))
        stream = streams[0]
        if stream.codec_context is None:
            raise _error(name, "has a video stream of an unknown codec")
        stream.codec_context.options = _DECODER_OPTIONS.get(stream.codec_context.name, {})
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = _threads(stream.codec_context.codec.canonical_name, threads)
        yield container, stream


@contextmanager
def _errors_of(name: str, reason: str) -> Iterator[None]:
    """Turns libav's errors into one line about the file."""
    try:
        yield
    except av.FFmpegError as error:
        detail = error.strerror or str(error)
        raise _error(name, f"{reason} ({detail})") from error


def _error(name: str, reason: str) -> VideoError:
    return VideoError(f"{name}: {reason}".replace("\n", " "))

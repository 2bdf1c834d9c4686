"""Decodes chosen frames of a file with PyAV: the whole file, or only the parts that are needed.

The packets are read once without decoding, which is cheap. They show the number of frames, which headers may state
wrongly, and the cost of decoding only the parts with the chosen frames (`mplug2_fast.video.seek`). If that is cheaper,
only those parts are decoded, and the result is checked. Otherwise the file is decoded from its first packet to its
last, and frames are counted. Both ways give the same frames.

Damage that the container, a packet or the decoder shows is an error. The decoder does not see skipped parts.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from itertools import pairwise

import numpy as np

from mplug2_fast.errors import VideoError
from mplug2_fast.video.files import FileFacts, inspect_file
from mplug2_fast.video.limits import DamagedError, Guard, LimitedFile, LimitError, too_much_memory
from mplug2_fast.video.pixels import squash
from mplug2_fast.video.preparation import Resampling
from mplug2_fast.video.seek import (
    CannotSeekError,
    PacketInfo,
    Scan,
    decode_segments,
    is_fresh_start,
    is_shown,
    plan_segments,
    split_units,
)

try:
    import av
    from av.container import InputContainer
    from av.stream import Disposition
    from av.video.reformatter import Interpolation, VideoReformatter
    from av.video.stream import VideoStream
except ImportError as error:
    raise ImportError("reading video files needs PyAV: pip install av") from error

from mplug2_fast.video.formats import MEDIA_FORMATS, PICTURE_FORMAT
from mplug2_fast.video.h264 import FieldCheck
from mplug2_fast.video.orientation import Orientation, OrientationReader
from mplug2_fast.video.transport import missing_packets

Choice = Callable[[int], Sequence[int]]
"""A function from the number of frames in the file to the indices to take."""

_FORMAT_OPTIONS = {
    "format_whitelist": ",".join(MEDIA_FORMATS),
    "protocol_whitelist": "file",
    "pattern_type": "none",
}
# By default this decoder hides damage silently. Other decoders do not get this option: with it they refuse files that
# are only unusual.
_DECODER_OPTIONS = {"mjpeg": {"err_detect": "explode"}}
# These decoders hide damage too, but mark the frame. When several threads decode frames, a frame may be returned before
# its mark is set; when several threads decode slices, much damage is not noticed at all.
_ONE_THREAD = frozenset(("h264", "mpeg4", "rv30", "rv40"))
# The maximum number of pictures that a decoder keeps; the second is for other codecs.
_KEPT_PICTURES = {"h264": 18, "hevc": 18, "vvc": 18, "vp9": 10, "av1": 10}
_KEPT_PICTURES_OTHERWISE = 3
# The memory of Python, NumPy and libav before the first frame.
_PROCESS_BYTES = 1 << 28


def decode_frames(
    path: str | os.PathLike[str],
    choose: Choice,
    *,
    may_seek: bool = True,
    threads: int | None = None,
    image_size: int | None = None,
    resampling: Resampling = "nearest",
    guard: Guard | None = None,
) -> list[np.ndarray]:
    """Decodes the chosen frames of a video or image file.

    Args:
        path: the file.
        choose: a function from the number of frames to the indices to take.
        may_seek: False decodes everything.
        threads: for decoding and for conversion to RGB; None means torch's number.
        image_size: height and width of the frames, which are squashed right after decoding; None keeps their size.
        resampling: how frames are squashed: see `squash`.
        guard: limits on the cost of the file; None means the default limits.

    Returns:
        one array for each index, (height, width, 3), uint8, RGB, upright.

    Raises:
        VideoError: the file cannot be read or decoded, or exceeds a limit; without `image_size`, the chosen frames
            differ in size.
    """
    name, guard = os.fsdecode(path), guard or Guard()
    scan = scan_packets(name, guard)
    threads = usual_threads(threads)
    sizes = {"image_size": image_size, "resampling": resampling}
    return decode_scanned(name, scan, choose, may_seek=may_seek, threads=threads, guard=guard, **sizes)


def decode_scanned(
    name: str,
    scan: Scan,
    choose: Choice,
    *,
    may_seek: bool = True,
    threads: int,
    image_size: int | None,
    resampling: Resampling = "nearest",
    guard: Guard,
) -> list[np.ndarray]:
    """`decode_frames` of a file whose packets are known."""
    indices = choose(max(scan.shown, 1))
    plan = plan_segments(scan, indices, _threads(scan, threads)) if may_seek else None
    if plan is not None:
        segments, times = plan
        convert = _Converter(name, scan, image_size, resampling, threads, guard)
        try:
            with _errors_of(name, None, guard), _open(name, scan, threads, guard) as (container, stream):
                found = dict(decode_segments(container, stream, scan, segments, convert))
            return [found[time] for time in times]
        except (CannotSeekError, av.FFmpegError):
            pass  # decoding everything shows whether the file is damaged
    count, found = _decode_all(name, scan, indices, threads, image_size, resampling, guard)
    if count != scan.shown:
        indices = choose(count)
        _, found = _decode_all(name, scan, indices, threads, image_size, resampling, guard)
        if not found.keys() >= set(indices):
            raise _error(name, "does not decode to the same frames twice")
    return [found[index] for index in indices]


def stream_scanned(
    name: str,
    scan: Scan,
    indices: list[int],
    *,
    threads: int,
    image_size: int | None,
    resampling: Resampling = "nearest",
    guard: Guard,
) -> Iterator[np.ndarray]:
    """Yields the frames with these ascending indices as they are decoded, without keeping them.

    Raises:
        VideoError: as in `decode_frames`, or an index is too large. Good frames may have come before.
    """
    plan = plan_segments(scan, indices, _threads(scan, threads)) if indices else None
    convert = _Converter(name, scan, image_size, resampling, threads, guard)
    done = 0
    if plan is not None:
        segments, times = plan
        with (
            suppress(CannotSeekError, av.FFmpegError),
            _errors_of(name, None, guard),
            _open(name, scan, threads, guard) as (container, stream),
        ):
            for time, pixels in decode_segments(container, stream, scan, segments, convert):
                while done < len(times) and times[done] == time:
                    yield pixels
                    guard.restart()
                    done += 1
            if done == len(times):
                return
    count = 0
    for frame in _every_frame(name, scan, threads, guard):
        if indices[done : done + 1] == [count]:
            pixels = convert(frame)
            while indices[done : done + 1] == [count]:
                yield pixels
                guard.restart()
                done += 1
        count += 1
    if done < len(indices):
        raise _error(name, f"has only {count:,} frames: there is no frame {indices[done]:,}")


def iterate_scanned(
    name: str, scan: Scan, *, threads: int, image_size: int | None, resampling: Resampling, guard: Guard
) -> Iterator[np.ndarray]:
    """Yields every frame of a file in order, as it is decoded.

    Arrays and errors are those of `decode_frames`. Good frames may come before an error.
    """
    convert = _Converter(name, scan, image_size, resampling, threads, guard)
    for frame in _every_frame(name, scan, threads, guard):
        yield convert(frame)
        guard.restart()


def count_frames(name: str, scan: Scan, threads: int, guard: Guard) -> int:
    """The number of frames: by the packets if they are reliable, otherwise by decoding everything."""
    return scan.shown if scan.one_frame_a_packet else sum(1 for _ in _every_frame(name, scan, threads, guard))


def frame_times(name: str, scan: Scan, threads: int, guard: Guard) -> list[float]:
    """The time of each frame, in seconds after the first; computed from the frame rate if times are missing."""
    tick = scan.seconds_a_tick
    if scan.one_frame_a_packet and tick:
        times = [time * tick for time in scan.times]
    else:
        times = [frame.time for frame in _every_frame(name, scan, threads, guard)]
        if None in times or any(later <= earlier for earlier, later in pairwise(times)):
            times = [index / (scan.fps or 1) for index in range(len(times))]
    return [time - times[0] for time in times]


def scan_packets(name: str, guard: Guard) -> Scan:
    """Reads all packets of a file, and checks without decoding that the file is complete.

    Raises:
        VideoError: the file is damaged, has no packets, or exceeds a limit.
    """
    with _errors_of(name, "is corrupt: its packets cannot be read", guard):
        facts = inspect_file(name, guard)
        if facts.has_tiles:
            raise DamagedError("is a picture that consists of tiles, which is not supported: convert it to JPEG or PNG")
        scan = _scan(name, facts, guard)
    if not scan.packets:
        raise _error(name, "has no frames")
    return scan


def orientation(name: str, scan: Scan, guard: Guard) -> Orientation:
    """The orientation of a file's first frame."""
    frame = next(_every_frame(name, scan, 1, guard))
    with _errors_of(name, None, guard):
        return OrientationReader()(frame)


def _scan(name: str, facts: FileFacts, guard: Guard) -> Scan:
    """Reads all packets of the video stream without decoding them."""
    scan = Scan(picture_end=facts.picture_end)
    limited = None if facts.is_bounded or facts.picture_end else LimitedFile(name, guard)
    with closing(limited) if limited else nullcontext(), _open(name, scan, 1, guard, limited) as (container, stream):
        context = stream.codec_context
        codec = scan.codec = context.codec.canonical_name
        scan.format = container.format.name
        scan.fps = None if stream.average_rate is None else float(stream.average_rate)
        scan.seconds_a_tick = None if stream.time_base is None else float(stream.time_base)
        scan.crop = facts.crops.get(stream.id if scan.format != "matroska,webm" else stream.index + 1)
        fields = FieldCheck(context.extradata or b"") if codec == "h264" else None
        blocks, tracks, last = facts.blocks, set(), None
        damaged = last_is_damaged = False
        max_frames = guard.limits.frames
        for packet in container.demux() if limited else container.demux(stream):
            guard.check()
            if limited:
                limited.found_packet()
            if not packet.size or packet.stream_index != stream.index:
                continue
            damaged |= packet.is_corrupt
            last_is_damaged = packet.is_corrupt
            if blocks is not None:
                tracks.add(blocks.mark_as_read(packet.pos))
            fresh_start, shown = is_fresh_start(packet, codec, context.extradata), is_shown(packet, codec)
            if fields is not None and (packet.is_keyframe or fields.fields_possible):
                scan.has_fields |= fields.holds_one_field(split_units(bytes(packet), codec, context.extradata or b""))
            scan.packets.append(PacketInfo(packet.pts, packet.size, fresh_start, shown))
            scan.changes |= packet.has_sidedata("new_extradata")
            if shown and packet.pts is not None and (last is None or packet.pts >= last):
                last, scan.last_duration = packet.pts, packet.duration or 0
            if max_frames is not None and len(scan.packets) > max_frames:
                raise LimitError(f"has more than {max_frames:,} frames; raise Limits.frames")
        if last_is_damaged or (damaged and not _is_joined(name, scan, stream, guard)):
            raise DamagedError("is corrupt or truncated: a packet is incomplete")
        _check_memory(scan, stream, guard)
    if blocks is not None and (position := blocks.first_not_read(tracks)) is not None:
        raise DamagedError(f"is corrupt: the block at byte {position:,} cannot be read")
    return scan


def _is_joined(name: str, scan: Scan, stream: VideoStream, guard: Guard) -> bool:
    """Whether packets look damaged only because whole transport streams were joined."""
    if scan.format != "mpegts":
        return False
    with open(name, "rb") as file:
        return not missing_packets(file, stream.id, guard)


def _check_memory(scan: Scan, stream: VideoStream, guard: Guard) -> None:
    """Compares the memory of the frames that a decoder keeps, by their size in the header, with the limit."""
    limit, context = guard.limits.memory, stream.codec_context
    if limit is None or context.format is None:
        return
    pixels = context.width * context.height
    frame = pixels * context.format.padded_bits_per_pixel // 8
    kept = min(_KEPT_PICTURES.get(scan.codec, _KEPT_PICTURES_OTHERWISE), len(scan.packets) + 1)
    room = limit - _PROCESS_BYTES - 6 * pixels  # for a frame in RGB and its copy
    if frame * min(kept, 2) > room:
        raise too_much_memory(limit)
    scan.is_heavy = frame * 2 * kept > room


def _decode_all(
    name: str,
    scan: Scan,
    indices: Sequence[int],
    threads: int,
    image_size: int | None,
    resampling: Resampling,
    guard: Guard,
) -> tuple[int, dict[int, np.ndarray]]:
    """The number of frames in the file, and those with these indices."""
    wanted, found, count = set(indices), {}, 0
    convert = _Converter(name, scan, image_size, resampling, threads, guard)
    for frame in _every_frame(name, scan, threads, guard):
        if count in wanted:
            found[count] = convert(frame)
        count += 1
    return count, found


def _every_frame(name: str, scan: Scan, threads: int, guard: Guard) -> Iterator[av.VideoFrame]:
    empty = True
    if scan.is_heavy:
        guard.watch_memory()
    with (
        _errors_of(name, "is corrupt: it cannot be decoded", guard),
        _open(name, scan, threads, guard) as (container, stream),
    ):
        for frame in container.decode(stream):
            guard.check()
            if frame.is_corrupt:
                raise DamagedError("is corrupt: the decoder reports a damaged frame")
            empty = False
            yield frame
    if empty:
        raise _error(name, "has no frames")


class _Converter:
    """Converts decoded frames to upright RGB arrays. Reuses its set-up for frames of the same size and pixel format.

    It records the size of the frames in the `Scan`.
    """

    def __init__(
        self, name: str, scan: Scan, image_size: int | None, resampling: Resampling, threads: int, guard: Guard
    ) -> None:
        self._name = name
        self._scan = scan
        self._crop = scan.crop
        self._image_size = image_size
        self._resampling = resampling
        self._threads = 1 if scan.is_heavy else threads
        self._guard = guard
        self._sizes: set[tuple[int, int]] = set()
        self._reformatter = VideoReformatter()
        self._orientation_of = OrientationReader()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        colours = f"its colours cannot be converted to RGB ({frame.format.name}, matrix {_matrix(frame)})"
        with _errors_of(self._name, colours, self._guard):
            self._guard.check()
            if self._image_size is not None and self._resampling == "bilinear" and self._crop is None:
                return self._scaled(frame, self._image_size)
            pixels = self._reformatter.reformat(frame, format="rgb24", threads=self._threads).to_ndarray()
            if self._crop is not None:
                top, bottom, left, right = self._crop
                height, width = pixels.shape[:2]
                if top + bottom >= height or left + right >= width:
                    raise DamagedError(f"is corrupt: cropping leaves nothing of its {width}x{height} frames")
                pixels = pixels[top : height - bottom, left : width - right]
            pixels = self._orientation_of(frame).upright(pixels)
        self._scan.size = pixels.shape[1], pixels.shape[0]
        if self._image_size is not None:
            return squash(pixels, self._image_size, self._resampling)
        self._sizes.add(pixels.shape[:2])
        if len(self._sizes) > 1:
            sizes = " and ".join(f"{width}x{height}" for height, width in sorted(self._sizes))
            raise _error(self._name, f"frames change size within the video ({sizes}): give an image_size")
        return pixels

    def _scaled(self, frame: av.VideoFrame, size: int) -> np.ndarray:
        """Converts and scales in one step, as libav's own scaling filter does."""
        orientation = self._orientation_of(frame)
        width, height = frame.width, frame.height
        self._scan.size = (height, width) if orientation.quarter_turns % 2 else (width, height)
        square = self._reformatter.reformat(
            frame, size, size, format="rgb24", interpolation=Interpolation.BILINEAR, threads=self._threads
        )
        return orientation.upright(square.to_ndarray())


def _matrix(frame: av.VideoFrame) -> str:
    return str(getattr(frame.colorspace, "name", frame.colorspace))


def usual_threads(threads: int | None) -> int:
    """The given number, or torch's number of threads."""
    if threads is not None:
        return threads
    import torch

    return torch.get_num_threads()


def _threads(scan: Scan, threads: int) -> int:
    return 1 if scan.codec in _ONE_THREAD or scan.is_heavy else threads


@contextmanager
def _open(
    name: str, scan: Scan, threads: int, guard: Guard, limited: LimitedFile | None = None
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and its video stream, ready to decode; read by libav itself, or through a `LimitedFile`."""
    not_readable = "is not a video or image that can be read"
    pixels = guard.limits.pixels
    limits = {} if pixels is None else {"max_pixels": str(min(pixels, 2**31 - 1))}

    source = limited or f"file:{name}"
    if scan.picture_end:
        with open(name, "rb") as file:
            source = io.BytesIO(file.read(scan.picture_end))
    with _errors_of(name, not_readable, guard):
        container = av.open(
            source,
            format=PICTURE_FORMAT if scan.picture_end else None,
            options=_FORMAT_OPTIONS | limits,
            metadata_errors="replace",
            timeout=guard.seconds_left,
        )
    with container:
        stream = _choose_stream(name, container)
        context = stream.codec_context
        if pixels is not None and context.width * context.height > pixels:
            size = f"{context.width:,}x{context.height:,}"
            raise _error(name, f"has frames of {size} pixels, more than {pixels:,} in total; raise Limits.pixels")
        context.options = _DECODER_OPTIONS.get(context.name, {}) | limits
        stream.thread_type = "AUTO"
        one_thread = context.codec.canonical_name in _ONE_THREAD or scan.is_heavy
        context.thread_count = 1 if one_thread else threads
        yield container, stream


def _choose_stream(name: str, container: InputContainer) -> VideoStream:
    """The stream that libav considers the best, but not a cover picture."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise _error(name, "has no video stream" + (", only audio" if container.streams.audio else ""))
    best = container.streams.best("video")
    if best not in streams:
        best = max(streams, key=_area)
    if best.codec_context is None:
        raise _error(name, "has a video stream of an unknown codec")
    return best


def _area(stream: VideoStream) -> int:
    return 0 if stream.codec_context is None else stream.codec_context.width * stream.codec_context.height


@contextmanager
def _errors_of(name: str, reason: str | None, guard: Guard) -> Iterator[None]:
    """Turns errors of a file into a `VideoError` of one line; without a `reason`, libav's errors stay unchanged."""
    try:
        yield
    except (DamagedError, LimitError) as error:
        raise _error(name, str(error)) from None
    except MemoryError as error:
        limit = guard.limits.memory
        detail = "needs more memory than is available" if limit is None else str(too_much_memory(limit))
        raise _error(name, detail) from error
    except (av.FFmpegError, OSError) as error:  # OSError: the file cannot be read
        try:
            guard.check()
        except LimitError as late:
            raise _error(name, str(late)) from None
        if reason is None:
            raise
        detail = error.strerror or str(error)
        if isinstance(error, av.ArgumentError) and guard.limits.pixels is not None:
            detail += f", or frames have more than {guard.limits.pixels:,} pixels in total: raise Limits.pixels"
        raise _error(name, f"{reason} ({detail})") from error


def _error(name: str, reason: str) -> VideoError:
    return VideoError(f"{name}: {reason}".replace("\n", " "))

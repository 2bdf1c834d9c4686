"""Decodes only the parts of a video that contain the chosen frames.

A part begins with a packet at which a decoder can start, and is decoded like a file: its packets in order, then the
frames that the decoder still holds. Frames are identified by their presentation times, which packets have too. The
result equals that of decoding everything if every packet gives one frame, all times exist and differ, and a decoder can
really start at the first packet. This is true for a few codecs and containers, and is checked for every packet and
frame. If it is not true, `plan_segments` returns None or `decode_segments` raises `CannotSeekError`, and the caller
decodes everything.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

_T = TypeVar("_T")

# One packet is one frame, with its own time, in these containers and codecs.
_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mjpeg")

# The kinds of coded picture at which a decoder can start. For h264 an IDR picture, since pictures after an I picture
# that is marked as a key frame may refer to pictures before it. For hevc an IDR or CRA picture. Pictures that come
# after a CRA picture but are shown before it may refer to earlier pictures: they belong to the part before.
_FRESH_STARTS = {"h264": (5,), "hevc": (19, 20, 21)}
_CODED_PICTURES = {"h264": range(1, 6), "hevc": range(32)}

# Seeking must save a quarter of the decoding, because it reads the packets a second time.
_WORTH_IT = 0.75


class CannotSeekError(Exception):
    """The file cannot be decoded in parts as its packets indicate. Decoding all of it may still work."""


@dataclass(frozen=True, slots=True)
class PacketInfo:
    """What one packet states."""

    pts: int | None
    size: int
    fresh_start: bool
    shown: bool


@dataclass
class Scan:
    """All packets of a video stream, in decoding order."""

    format: str = ""
    codec: str = ""
    packets: list[PacketInfo] = field(default_factory=list)
    changes: bool = False
    """Whether the decoder's parameters change in the stream."""
    has_fields: bool = False
    """Whether a packet holds one field of a picture, so that two packets give one frame."""
    fps: float | None = None
    """The average rate that the container states."""
    seconds_a_tick: float | None = None
    """The unit of presentation times."""
    last_duration: int = 0
    """The duration of the packet that is shown last, in ticks; 0 if it is unknown."""
    picture_end: int | None = None
    """The end of the file's only picture; other data may follow it."""
    crop: tuple[int, int, int, int] | None = None
    """The pixels that the container cuts off at the top, bottom, left and right."""
    is_heavy: bool = False
    """Whether decoding could take more memory than the limit."""
    size: tuple[int, int] | None = None
    """Width and height of the frames, upright; None until one is decoded."""

    @property
    def shown(self) -> int:
        """Number of packets whose frame is shown: usually the number of frames."""
        return sum(packet.shown for packet in self.packets)

    @property
    def one_frame_a_packet(self) -> bool:
        """Whether, by the packets, each gives one frame with its own time, and a decoder can start at the first."""
        packets = self.packets
        times = [packet.pts for packet in packets]
        return bool(
            self.format in _FORMATS
            and self.codec in _CODECS
            and not self.changes
            and not self.has_fields
            and all(packet.shown for packet in packets)
            and None not in times
            and len(set(times)) == len(times)
            and packets[0].fresh_start
            and times[0] == min(times)
        )

    @property
    def times(self) -> list[int] | None:
        """The ascending presentation times of the packets that are shown; None if some are missing or equal."""
        times = sorted(packet.pts for packet in self.packets if packet.shown and packet.pts is not None)
        return times if len(set(times)) == self.shown else None

    def seconds(self, frames: int) -> float | None:
        """The duration of the frames: by their times, or by their rate if times are missing."""
        times = self.times
        if times and self.seconds_a_tick:
            gaps = sorted(later - earlier for earlier, later in pairwise(times))
            usual = gaps[len(gaps) // 2] if gaps else 0
            # If packets and frames have different orders, the duration of a packet is the time to the next packet.
            order = [packet.pts for packet in self.packets if packet.shown]
            last = self.last_duration if order == times and self.last_duration else usual
            if times[-1] + last > times[0]:
                return (times[-1] + last - times[0]) * self.seconds_a_tick
        return frames / self.fps if self.fps else None


@dataclass(frozen=True)
class Segment:
    """The packets from `first` to `last`, in decoding order, which give the frames with these `times`."""

    first: int
    last: int
    times: tuple[int, ...]


def is_fresh_start(packet: Packet, codec: str, extradata: bytes | None) -> bool:
    """Whether a decoder that starts at this packet decodes its frame and all frames shown later correctly."""
    if not packet.is_keyframe:
        return False
    if codec not in _FRESH_STARTS:
        return True
    for unit in split_units(bytes(packet), codec, extradata or b""):
        kind = unit[0] >> 1 & 63 if codec == "hevc" else unit[0] & 31
        if kind in _CODED_PICTURES[codec]:
            return kind in _FRESH_STARTS[codec]
    return False


def is_shown(packet: Packet, codec: str) -> bool:
    """Whether a packet gives a frame by its own data; VP8 and VP9 have frames that serve only as references."""
    if packet.is_discard:
        return False
    data = memoryview(packet)
    if codec == "vp8":
        return bool(data[0] & 0x10)
    if codec == "vp9":  # a shown frame, a repeated earlier frame, or several frames of which the last is shown
        return bool(data[0] & 0x0A) or data[-1] & 0xE0 == 0xC0
    return True


def plan_segments(scan: Scan, indices: Sequence[int], threads: int) -> tuple[list[Segment], list[int]] | None:
    """The parts to decode for these indices, and the time of each frame; None to decode everything."""
    if not scan.one_frame_a_packet:
        return None
    packets = scan.packets
    times = [packet.pts for packet in packets]
    order = sorted(range(len(packets)), key=times.__getitem__)
    starts = [position for position, packet in enumerate(packets) if packet.fresh_start]
    parts: dict[int, list[int]] = {}
    for position in dict.fromkeys(order[index] for index in indices):
        before = bisect_right(starts, position) - 1
        while times[starts[before]] > times[position]:
            before -= 1
        parts.setdefault(starts[before], []).append(position)
    segments = [Segment(first, max(part), tuple(times[at] for at in part)) for first, part in sorted(parts.items())]
    # The cost of a part: its packets, and the frames that threads could decode while they wait for the end of the part.
    cost = sum(segment.last - segment.first + threads for segment in segments)
    if cost > _WORTH_IT * len(packets):
        return None
    return segments, [times[order[index]] for index in indices]


def decode_segments(
    container: InputContainer,
    stream: VideoStream,
    scan: Scan,
    segments: Sequence[Segment],
    convert: Callable[[VideoFrame], _T],
) -> Iterator[tuple[int, _T]]:
    """Yields the segments' times, in ascending order, and the converted frames.

    Raises:
        CannotSeekError: packets or frames differ from those expected; frames that came before are correct.
        av.FFmpegError: a packet cannot be decoded.
    """
    positions = {packet.pts: position for position, packet in enumerate(scan.packets)}
    for segment in segments:
        start = scan.packets[segment.first].pts
        expected = sorted(p.pts for p in scan.packets[segment.first : segment.last + 1] if p.pts >= start)
        wanted, shown = set(segment.times), 0
        for frame in _decode_segment(container, stream, scan, segment, positions):
            if frame.is_corrupt:
                raise CannotSeekError("a frame is damaged")
            if expected[shown : shown + 1] != [frame.pts]:
                raise CannotSeekError("frames and packets have different times")
            shown += 1
            if frame.pts in wanted:
                yield frame.pts, convert(frame)
        if shown != len(expected):
            raise CannotSeekError("frames are missing")


def _decode_segment(
    container: InputContainer, stream: VideoStream, scan: Scan, segment: Segment, positions: dict[int, int]
) -> Iterator[VideoFrame]:
    start = scan.packets[segment.first]
    container.seek(start.pts, stream=stream)
    expected = segment.first
    for packet in container.demux(stream):
        position = positions.get(packet.pts)
        if expected == segment.first and position is not None and position < expected:
            continue
        if position != expected or packet.size != scan.packets[expected].size:
            raise CannotSeekError("seeking does not lead to the requested packet")
        if packet.pts >= start.pts:  # frames shown before the start may refer to pictures before it
            yield from stream.codec_context.decode(packet)
        expected += 1
        if expected > segment.last:
            break
    yield from stream.codec_context.decode(None)
    stream.codec_context.flush_buffers()


def split_units(data: bytes, codec: str, extradata: bytes) -> Iterator[memoryview]:
    """Yields the units of an h264 or hevc packet, each from its header on."""
    view = memoryview(data)
    in_box = len(extradata) > 22 and extradata[0] == 1 if codec == "hevc" else len(extradata) > 6 and extradata[0] == 1
    if in_box:
        size_bytes = (extradata[21 if codec == "hevc" else 4] & 3) + 1
        position = 0
        while position + size_bytes < len(data):
            unit = position + size_bytes
            position = unit + int.from_bytes(data[position:unit], "big")
            if position > unit:
                yield view[unit:position]
    else:
        position = data.find(b"\0\0\1")
        while 0 <= position < len(data) - 3:
            following = data.find(b"\0\0\1", position + 3)
            yield view[position + 3 : following if following >= 0 else len(data)]
            position = following

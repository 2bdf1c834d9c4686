"""Checks of a file before decoding: it is a file, it is complete, and the sizes that it claims are bounded.

Decoders accept the end of a truncated file as the end of the video. Only the container shows that something is missing,
so the length that it states is compared with the file's, and its index with its contents.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import BinaryIO

from mplug2_fast.video.avi import check_chunks
from mplug2_fast.video.limits import DamagedError, Guard, LimitError, Steps
from mplug2_fast.video.matroska import Blocks, ebml_number, find_blocks
from mplug2_fast.video.mp4 import TOP_LEVEL, Movie, read_movie

_JPEG_NAMES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")
_PNG = b"\x89PNG\r\n\x1a\n"
_BITMAP_HEADERS = tuple(size.to_bytes(4, "little") for size in (40, 52, 56, 108, 124))
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_EBML = b"\x1a\x45\xdf\xa3"


@dataclass
class FileFacts:
    """What the structure of a file shows."""

    picture_end: int | None = None
    """The end of the file's only picture; other data may follow it."""
    blocks: Blocks | None = None
    crops: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    """For each stream that the container crops: the pixels to cut off at the top, bottom, left and right."""
    has_tiles: bool = False
    is_bounded: bool = False
    """Whether its structure shows that its packets are not larger than the limit."""


def inspect_file(path: str, guard: Guard) -> FileFacts:
    """Reads the structure of a file, without decoding.

    Raises:
        DamagedError: it is not a complete video or image file; the message states the reason.
        LimitError: it claims more than the limits allow.
    """
    with open_media(path) as (file, status):
        facts = _inspect(file, status.st_size, PurePath(path).suffix.lower(), guard)
        # A small sparse file can claim a huge size.
        facts.is_bounded &= 1024 * status.st_blocks >= status.st_size
        return facts


@contextmanager
def open_media(path: str) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """A regular file that is not empty, open for reading, and its status.

    Raises:
        DamagedError: there is no such file, it is no regular file, it is empty, or it cannot be read.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise DamagedError("is a directory, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError("is not a regular file")
        if status.st_size == 0:
            raise DamagedError("is empty")
        with open(path, "rb") as file:
            yield file, status
    except FileNotFoundError:
        raise DamagedError("no such file") from None
    except PermissionError:
        raise DamagedError("may not be read: permission denied") from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _inspect(file: BinaryIO, size: int, suffix: str, guard: Guard) -> FileFacts:
    facts = FileFacts()
    head = file.read(64)
    _check_pixels(_picture_size(file, head), guard)
    file.seek(0)
    announced = 0
    if head[4:8] in TOP_LEVEL:
        with _corrupt():
            movie = read_movie(file, size, guard)
        announced, facts.is_bounded = movie.end, True
        _use_movie(facts, movie)
    elif head[:4] == _EBML:
        announced = _end_of_matroska(head)
        if announced <= size:
            facts.is_bounded = True
            with _corrupt():
                facts.blocks = find_blocks(file, size, guard)
            facts.crops = facts.blocks.crops
    elif head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        check_chunks(file, size, guard)
        facts.is_bounded = True
    elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        announced = 8 + int.from_bytes(head[4:8], "little")
        if head[12:16] == b"VP8X" and head[20] & 2:
            raise DamagedError("is an animated WebP file, which is not supported: convert it to GIF, APNG or a video")
    elif head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        raise DamagedError("has no video stream, only audio")
    elif head[:6] in (b"GIF87a", b"GIF89a"):
        announced, facts.is_bounded = _end_of_gif(file, size, guard), True
    else:
        facts.picture_end = _end_of_only_picture(file, size, head, suffix)
        if (facts.picture_end or 0) > guard.limits.packet_bytes:
            raise LimitError(f"is a picture of {size:,} bytes; the limit is {guard.limits.packet_bytes:,}")
    if announced > size:
        raise DamagedError(f"is truncated: it has {size:,} bytes of at least {announced:,}")
    return facts


@contextmanager
def _corrupt() -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        raise DamagedError(f"is corrupt: {error}") from None


def _use_movie(facts: FileFacts, movie: Movie) -> None:
    facts.crops = movie.crops
    facts.has_tiles = movie.primary_item == b"grid"


def _check_pixels(size: tuple[int, int], guard: Guard) -> None:
    """Checks the size of a picture, because libav reports it only after decoding."""
    width, height = size
    limit = guard.limits.pixels
    if limit is not None and width * height > limit:
        raise LimitError(
            f"has frames of {width:,}x{height:,} pixels, more than {limit:,} in total; raise Limits.pixels"
        )


def _picture_size(file: BinaryIO, head: bytes, start: int = 0) -> tuple[int, int]:
    """Width and height by the header of the picture at `start`; 0 if they are unknown."""
    if head.startswith(_PNG):
        return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    if head[:3] == b"GIF":
        return int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
    if head[:2] == b"BM" and head[14:18] in _BITMAP_HEADERS:
        return int.from_bytes(head[18:22], "little"), abs(int.from_bytes(head[22:26], "little", signed=True))
    if head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    for marker, segment in _jpeg_segments(file, head, start):
        if marker in _JPEG_FRAMES:
            return int.from_bytes(segment[7:9], "big"), int.from_bytes(segment[5:7], "big")
    return 0, 0


def _jpeg_segments(file: BinaryIO, head: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """The marker and the first bytes of each segment before the data of the first picture."""
    position = start + 2
    for _ in range(1000 if head[:3] == b"\xff\xd8\xff" else 0):
        file.seek(position)
        segment = file.read(9)
        if len(segment) < 9 or segment[0] != 0xFF or segment[1] == 0xDA:
            return
        yield segment[1], segment
        position += 2 + int.from_bytes(segment[2:4], "big")


def _end_of_only_picture(file: BinaryIO, size: int, head: bytes, suffix: str) -> int | None:
    """The end of the first picture in a JPEG file; None if it is no JPEG file, or a video.

    More pictures may follow the first, such as other views or a brightness map. Such a file has a list of them, or a
    name with the suffix of a JPEG file. Without either, several JPEG pictures of the same size are a video.
    """
    if head[:3] != b"\xff\xd8\xff":
        return None
    end = _after_jpeg(file)
    file.seek(end)
    following = file.read(64)
    is_list = any(marker == 0xE2 and segment[4:8] == b"MPF\0" for marker, segment in _jpeg_segments(file, head))
    if suffix in _JPEG_NAMES or is_list or _picture_size(file, following, end) != _picture_size(file, head):
        return end or size
    return None


def _after_jpeg(file: BinaryIO) -> int:
    """The position after the first picture; 0 if it has no end."""
    position = 2
    for _ in range(1000):
        file.seek(position)
        segment = file.read(4)
        if len(segment) < 4 or segment[0] != 0xFF:
            return 0
        position += 2 + int.from_bytes(segment[2:4], "big")
        if segment[1] == 0xDA:
            break
    file.seek(position)
    before = b""
    while data := file.read(1 << 20):
        end = (before + data).find(b"\xff\xd9")
        if end >= 0:
            return position - len(before) + end + 2
        position += len(data)
        before = data[-1:]
    return 0


def _end_of_matroska(head: bytes) -> int:
    """The end of the segment: the second element, after the EBML header."""
    header_size, position = ebml_number(head, 4)
    if header_size is None or head[position + header_size :][:4] != b"\x18\x53\x80\x67":
        return 0
    segment_size, position = ebml_number(head, position + header_size + 4)
    return 0 if segment_size is None else position + segment_size


def _end_of_gif(file: BinaryIO, size: int, guard: Guard) -> int:
    """The position after the trailer, or a position beyond the end of the file if the trailer is missing."""
    steps = Steps(guard, size, 0.25)
    start, window = 0, b""

    def read(position: int) -> int:
        nonlocal start, window
        if not start <= position < start + len(window):
            file.seek(position)
            start, window = position, file.read(1 << 16)
        return window[position - start] if window else 0

    def after_colours(flags: int, position: int) -> int:
        return position + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)

    def after_blocks(position: int) -> int:
        while position < size and (length := read(position)):
            steps.take()
            position += 1 + length
        return position + 1

    if size < 13:
        return size + 1
    position = after_colours(read(10), 13)
    while position < size:
        steps.take()
        kind = read(position)
        if kind == 0x21:  # an extension: a label, blocks
            position = after_blocks(position + 2)
        elif kind == 0x2C and position + 10 <= size:  # an image: colours, the code size, blocks
            position = after_blocks(after_colours(read(position + 9), position + 10) + 1)
        else:
            return size + 1 if kind == 0x2C else position + 1  # the trailer, or data that the decoder checks
    return size + 1

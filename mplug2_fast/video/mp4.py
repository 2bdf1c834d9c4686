"""Checks the boxes of an mp4, mov, HEIF or AVIF file, and reads what libav ignores.

libav creates an index entry for each frame that a table claims, and a table can claim billions in a few bytes. It does
not crop pictures to their clean aperture.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import BinaryIO

import numpy as np

from mplug2_fast.video.limits import DamagedError, Guard, LimitError, Steps

TOP_LEVEL = frozenset(
    b"ftyp styp moov mdat moof mfra free skip wide pnot uuid meta sidx ssix emsg prft udta".split(),
)
"""The boxes at the top level of a file; any other data after them is not part of the container."""

_CONTAINERS = frozenset(b"moov trak mdia minf stbl edts moof traf mvex".split())
# The bytes of one entry of each table. A table begins with a version, flags and the number of its entries.
_TABLES = {b"stts": 8, b"ctts": 8, b"stsc": 12, b"stco": 4, b"co64": 8, b"stss": 4, b"stps": 4}
_MAX_HEADER = 1 << 26
_MAX_DEPTH = 16


@dataclass
class _Track:
    """What the tables of a track state."""

    id: int = 0
    samples: int = 0
    sample_bytes: int = 0
    constant_duration: int = 0
    is_sound: bool = False
    edits: int = 0
    crop: tuple[int, int, int, int] | None = None


@dataclass
class Movie:
    """What the boxes of a file state."""

    end: int = 0
    """The position after the last box, which may be beyond the end of the file."""
    crops: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    """For each cropped track: the pixels to cut off at the top, bottom, left and right."""
    primary_item: bytes = b""
    """The type of a still picture, such as "grid" for one that consists of tiles."""
    index_entries: int = 0


def read_movie(file: BinaryIO, size: int, guard: Guard) -> Movie:
    """Reads the boxes of a file.

    Raises:
        DamagedError: a table claims more entries than fit into it, or frames that do not fit into the file.
        LimitError: the index would exceed the limit on frames, or there are too many boxes.
    """
    movie, steps = Movie(), Steps(guard, size)
    for kind, start, end in _boxes(file, 0, size, steps, top=True):
        movie.end = end
        if end <= size:
            _read_box(_Place(file, size, guard, movie, steps), kind, start, end, _Track(), 0)
    return movie


@dataclass(frozen=True)
class _Place:
    """The file that is read, and the result."""

    file: BinaryIO
    size: int
    guard: Guard
    movie: Movie
    steps: Steps


def _boxes(
    file: BinaryIO, start: int, end: int, steps: Steps, *, top: bool = False
) -> Iterator[tuple[bytes, int, int]]:
    """Yields the type of each box, and the start and end of its contents."""
    position = start
    while position + 8 <= end:
        steps.take()
        file.seek(position)
        head = file.read(16)
        length, kind, header = int.from_bytes(head[:4], "big"), head[4:8], 8
        if top and (kind not in TOP_LEVEL or length == 0):  # 0: to the end of the file
            return
        if length == 1:
            length, header = int.from_bytes(head[8:16], "big"), 16
        if length < header or (not top and position + length > end):
            return
        yield kind, position + header, position + length
        position += length


def _read_box(place: _Place, kind: bytes, start: int, end: int, track: _Track, depth: int) -> None:
    if kind in _CONTAINERS:
        if depth > _MAX_DEPTH:
            raise DamagedError(f"its boxes are nested more than {_MAX_DEPTH} deep")
        inner = _Track() if kind in (b"trak", b"traf") else track
        for box in _boxes(place.file, start, end, place.steps):
            _read_box(place, *box, inner, depth + 1)
        if kind == b"trak":
            _finish_track(place, inner)
    elif kind == b"meta":
        _read_meta(place, start, end)
    elif kind == b"cmov":
        _read_compressed(place, start, end)
    elif kind in _READERS:
        place.file.seek(start)
        head = place.file.read(min(end - start, 64))
        _READERS[kind](place, kind, head, start, end, track)
    elif kind in _TABLES:
        place.file.seek(start)
        head = place.file.read(min(end - start, 16))
        if len(head) >= 8:
            _check_table(kind, int.from_bytes(head[4:8], "big"), _TABLES[kind], end - start - 8)
        if kind == b"stts" and len(head) == 16 and head[4:8] == b"\0\0\0\1":
            track.constant_duration = int.from_bytes(head[12:16], "big")


def _check_table(kind: bytes, entries: int, entry_bytes: int, room: int) -> None:
    if entries * entry_bytes > room:
        raise DamagedError(f"the table {kind.decode()} claims {entries:,} entries, which do not fit into it")


def _read_track_header(place: _Place, kind: bytes, head: bytes, start: int, end: int, track: _Track) -> None:
    position = 20 if head[:1] == b"\1" else 12
    track.id = int.from_bytes(head[position : position + 4], "big")


def _read_sample_sizes(place: _Place, kind: bytes, head: bytes, start: int, end: int, track: _Track) -> None:
    if len(head) < 12:
        return
    size, track.samples = struct.unpack(">II", head[4:12])
    if kind == b"stz2":
        track.sample_bytes = 0
        _check_table(kind, track.samples, 1, 2 * (end - start))
    elif size == 0:
        _check_table(kind, track.samples, 4, end - start - 12)
        place.file.seek(start + 12)
        _check_sample(place, int(np.frombuffer(place.file.read(4 * track.samples), ">u4").max(initial=0)))
    else:
        track.sample_bytes = size
        _check_sample(place, size)


def _check_sample(place: _Place, size: int) -> None:
    limit = place.guard.limits.packet_bytes
    if size > limit:
        raise LimitError(f"claims a frame of {size:,} bytes; the limit is {limit:,}")


def _read_handler(place: _Place, kind: bytes, head: bytes, start: int, end: int, track: _Track) -> None:
    track.is_sound = head[8:12] == b"soun"


def _read_edits(place: _Place, kind: bytes, head: bytes, start: int, end: int, track: _Track) -> None:
    track.edits = int.from_bytes(head[4:8], "big")
    _check_table(kind, track.edits, 20 if head[:1] == b"\1" else 12, end - start - 8)


def _read_run(place: _Place, kind: bytes, head: bytes, start: int, end: int, track: _Track) -> None:
    if len(head) < 8:
        return
    flags, samples = struct.unpack(">II", head[:8])
    entry = 4 * bin(flags & 0xF00).count("1")
    _check_table(kind, samples, entry, end - start - 8)
    _count_entries(place, samples)


def _read_descriptions(place: _Place, kind: bytes, head: bytes, start: int, end: int, track: _Track) -> None:
    """Reads the clean aperture of the first kind of sample."""
    for _, first, last in _boxes(place.file, start + 8, end, place.steps):
        place.file.seek(first)
        picture = place.file.read(78)
        for inner, at, inner_end in _boxes(place.file, first + 78, last, place.steps):
            if inner == b"clap" and inner_end - at >= 32 and len(picture) == 78:
                place.file.seek(at)
                track.crop = _crop(place.file.read(32), *struct.unpack(">HH", picture[24:28]))
        return


def _crop(aperture: bytes, width: int, height: int) -> tuple[int, int, int, int] | None:
    """Pixels to cut off at the top, bottom, left and right; None if the aperture is not within the picture."""
    numbers = struct.unpack(">8i", aperture)
    if 0 in numbers[1::2]:
        return None
    clean_width, clean_height, right, down = (Fraction(a, b) for a, b in zip(numbers[::2], numbers[1::2], strict=True))
    left = Fraction(width - 1, 2) + right - (clean_width - 1) / 2
    top = Fraction(height - 1, 2) + down - (clean_height - 1) / 2
    right, bottom = left + clean_width, top + clean_height
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        return None
    return int(top), height - 1 - int(bottom - 1), int(left), width - 1 - int(right - 1)


_READERS = {
    b"hdlr": _read_handler,
    b"tkhd": _read_track_header,
    b"stsz": _read_sample_sizes,
    b"stz2": _read_sample_sizes,
    b"elst": _read_edits,
    b"trun": _read_run,
    b"stsd": _read_descriptions,
}


def _finish_track(place: _Place, track: _Track) -> None:
    if track.crop:
        place.movie.crops[track.id] = track.crop
    if track.is_sound and track.constant_duration == 1 and track.sample_bytes:
        return  # for such samples libav creates an entry for each chunk only
    if track.samples * track.sample_bytes > place.size:
        raise DamagedError(
            f"it claims {track.samples:,} frames of {track.sample_bytes:,} bytes, but has {place.size:,} bytes"
        )
    _count_entries(place, track.samples * max(track.edits, 1))


def _count_entries(place: _Place, entries: int) -> None:
    place.movie.index_entries += entries
    limit = place.guard.limits.frames
    if limit is not None and place.movie.index_entries > 4 * limit:
        raise LimitError(f"claims more than {4 * limit:,} frames of pictures and sound; raise Limits.frames")


def _read_compressed(place: _Place, start: int, end: int) -> None:
    """Reads a compressed header, which old versions of QuickTime write."""
    for kind, at, last in _boxes(place.file, start, end, place.steps):
        if kind != b"cmvd":
            continue
        place.file.seek(at)
        claimed = int.from_bytes(place.file.read(4), "big")
        if max(claimed, last - at) > _MAX_HEADER:
            raise LimitError(f"has a compressed header of {claimed:,} bytes; the limit is {_MAX_HEADER:,}")
        try:
            data = zlib.decompressobj().decompress(place.file.read(last - at - 4), claimed)
        except zlib.error as error:
            raise DamagedError("its compressed header cannot be read") from error
        inner = _Place(io.BytesIO(data), place.size, place.guard, place.movie, place.steps)
        for box in _boxes(inner.file, 0, len(data), place.steps):
            if box[0] == b"moov":
                for part in _boxes(inner.file, *box[1:], place.steps):
                    if part[0] != b"cmov":
                        _read_box(inner, *part, _Track(), 1)


def _read_meta(place: _Place, start: int, end: int) -> None:
    """Reads the items of a HEIF or AVIF file. QuickTime has a box of this name with another layout."""
    primary, kinds = None, {}
    for kind, at, last in _boxes(place.file, start + 4, end, place.steps):
        place.file.seek(at)
        head = place.file.read(min(last - at, 16))
        wide = head[:1] != b"\0"
        if kind == b"pitm":
            primary = int.from_bytes(head[4 : 8 if wide else 6], "big")
        elif kind == b"iinf":
            entries = int.from_bytes(head[4 : 8 if wide else 6], "big")
            _check_table(kind, entries, 8, last - at)
            for item, first, _ in _boxes(place.file, at + (8 if wide else 6), last, place.steps):
                if item == b"infe":
                    place.file.seek(first)
                    entry = place.file.read(14)
                    number, rest = (4, 10) if entry[:1] == b"\3" else (2, 8)
                    kinds[int.from_bytes(entry[4 : 4 + number], "big")] = entry[rest : rest + 4]
        elif kind == b"iloc":
            items = int.from_bytes(head[6 : 10 if head[:1] == b"\2" else 8], "big")
            _check_table(kind, items, 6, last - at)
    place.movie.primary_item = kinds.get(primary, b"")

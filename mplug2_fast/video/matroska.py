"""Finds the blocks of a Matroska or WebM file by following its structure.

The file consists of elements: an id, a size, and as many bytes, which may be elements again. Where one is damaged,
libav silently skips to the next part that it recognises. The sizes show this: undamaged elements exactly fill the
element around them.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from mplug2_fast.video.limits import DamagedError, Guard, LimitError, Steps

_SEGMENT = 0x18538067
_TRACKS, _TRACK, _TRACK_NUMBER, _VIDEO = 0x1654AE6B, 0xAE, 0xD7, 0xE0
_CROPS = (0x54BB, 0x54AA, 0x54CC, 0x54DD)
_CLUSTER, _GROUP, _BLOCK, _SIMPLE_BLOCK = 0x1F43B675, 0xA0, 0xA1, 0xA3
_VOID, _CHECKSUM = 0xEC, 0xBF
_CONTAINERS = frozenset((_SEGMENT, _TRACKS, _TRACK, _VIDEO, _CLUSTER, _GROUP))
_MAY_BE_OPEN = (_SEGMENT, _CLUSTER)

# The ids of one byte that may occur in a cluster and in a group of blocks, and the maximum size of such an element. All
# short ids of Matroska are assigned, so any other is damage; unknown longer ids may be new.
_ANY = 1 << 56
_SHORT_IDS = {
    _CLUSTER: dict.fromkeys((_SIMPLE_BLOCK, _GROUP, 0xAF, _VOID), _ANY)
    | dict.fromkeys((0xE7, 0xA7, 0xAB), 8)
    | {_CHECKSUM: 4},
    _GROUP: dict.fromkeys((_BLOCK, 0xA2, 0xA4, 0x8E, 0xC8, _VOID), _ANY)
    | dict.fromkeys((0x9B, 0xFA, 0xFB, 0xFD), 8)
    | {_CHECKSUM: 4},
}

# The maximum bytes of an id, of a size, and of the track number at the start of a block.
_HEAD = 4 + 8 + 8


@dataclass
class Blocks:
    """The blocks of a file, and the cropping of its tracks.

    `positions` are the ascending positions of the blocks' contents; `tracks` are the numbers of their tracks.
    """

    positions: array = field(default_factory=lambda: array("Q"))
    tracks: array = field(default_factory=lambda: array("Q"))
    crops: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    """The pixels to cut off at the top, bottom, left and right of each track."""
    read: bytearray = field(default_factory=bytearray)

    def mark_as_read(self, position: int | None) -> int | None:
        """Marks the block at this position as read by libav. Returns its track, or None if there is no such block."""
        if position is None:
            return None
        index = bisect_left(self.positions, position)
        if index == len(self.positions) or self.positions[index] != position:
            return None
        self.read[index] = 1
        return self.tracks[index]

    def first_not_read(self, tracks: set[int]) -> int | None:
        """The position of the first block of these tracks that libav has skipped."""
        index = self.read.find(0)
        while index >= 0:
            if self.tracks[index] in tracks:
                return self.positions[index]
            index = self.read.find(0, index + 1)
        return None


def find_blocks(file: BinaryIO, size: int, guard: Guard) -> Blocks:
    """Finds the blocks of a file.

    In live recordings, whose segment has an open size, the search ends at an element that does not fit or is open too.

    Raises:
        DamagedError: an element does not fit into the one around it, or a block belongs to no track.
        LimitError: there are too many elements, or one is too large.
    """
    blocks = Blocks()
    tracks: set[int] = set()
    track, crop = 0, dict.fromkeys(_CROPS, 0)
    limit, fillers = guard.limits.packet_bytes, Steps(guard, size, 1 / 64)
    for element, start, length, head in _elements(file, size, Steps(guard, size)):
        if element in (_SIMPLE_BLOCK, _BLOCK):
            number, begins = ebml_number(head, 0)
            if tracks and number not in tracks:
                raise DamagedError(f"the block at byte {start:,} belongs to no track")
            if length > begins + 3:  # after a time and flags, a frame
                blocks.positions.append(start)
                blocks.tracks.append(number)
        elif element == _VOID:
            fillers.take()
        elif element == _TRACK:
            crop = dict.fromkeys(_CROPS, 0)
        elif element == _TRACK_NUMBER:
            track = int.from_bytes(head[:length], "big")
            tracks.add(track)
        elif element in _CROPS and length <= 8:
            crop[element] = int.from_bytes(head[:length], "big")
        if element in _CROPS or (element == _TRACK_NUMBER and any(crop.values())):
            blocks.crops[track] = tuple(crop.values())
        if length > limit and element not in (*_CONTAINERS, _VOID):
            raise LimitError(f"has an element of {length:,} bytes; the limit is {limit:,}")
    blocks.read = bytearray(len(blocks.positions))
    return blocks


def _elements(file: BinaryIO, size: int, steps: Steps) -> Iterator[tuple[int, int, int, bytes]]:
    """Yields the elements up to the end of the segment: id, start, length and first bytes of the contents."""
    position, parent_end, short_ids, outer, is_open = 0, size, None, [], False
    while position < parent_end:
        steps.take()
        file.seek(position)
        head = file.read(_HEAD)
        id_size = 9 - head[0].bit_length()
        length, at = ebml_number(head, id_size)
        element = int.from_bytes(head[:id_size], "big")
        start = position + at
        if length is None and at > id_size and element in _MAY_BE_OPEN:
            if element != _SEGMENT:
                return
            length, is_open = size - start, True
        if (
            length is None
            or start + length > parent_end
            or id_size > 4
            or (id_size == 1 and short_ids and length > short_ids.get(element, -1))
        ):
            if is_open:
                return
            raise DamagedError(f"the element at byte {position:,} does not fit into its place")
        yield element, start, length, head[at:]
        if element in _CONTAINERS:
            outer.append((parent_end, short_ids))
            position, parent_end, short_ids = start, start + length, _SHORT_IDS.get(element)
        else:
            position = start + length
        while position == parent_end and len(outer) > 1:
            parent_end, short_ids = outer.pop()
        # The loop ends with the segment: data after it is not part of the container.


def ebml_number(data: bytes, position: int) -> tuple[int | None, int]:
    """A number of variable length and the position after it.

    The number is None for an open size, as in a live recording. At the end of the data it is None too, and the position
    is unchanged.
    """
    first = data[position] if position < len(data) else 0
    if 0x80 <= first < 0xFF:  # the usual case
        return first - 0x80, position + 1
    size = 9 - first.bit_length()
    end = position + size
    if not first or end > len(data):
        return None, position
    value = int.from_bytes(data[position:end], "big")
    marker = 1 << 7 * size
    return (None if value == 2 * marker - 1 else value - marker), end

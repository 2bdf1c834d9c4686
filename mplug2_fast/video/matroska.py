"""The blocks of a Matroska or WebM file, found by following its structure.

The file consists of elements: an id, a size, and that many bytes, which may be elements again. Where one is damaged,
libav looks for the next part of the file that it recognises and leaves out what lies between, without a word. Following
the sizes tells: elements that are whole fill the element around them to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

_SEGMENT = 0x18538067
_TRACKS, _TRACK, _TRACK_NUMBER = 0x1654AE6B, 0xAE, 0xD7
_CLUSTER, _GROUP, _BLOCK, _SIMPLE_BLOCK = 0x1F43B675, 0xA0, 0xA1, 0xA3
_VOID, _CHECKSUM = 0xEC, 0xBF
_ENTERED = frozenset((_SEGMENT, _TRACKS, _TRACK, _CLUSTER, _GROUP))
_MAY_BE_OPEN = (_SEGMENT, _CLUSTER)

# The ids of one byte that there are in a cluster and in a group of blocks, and the most bytes that such an element can
# hold. Matroska gave all short ids away long ago, so that any other is damage; longer ones may be news.
_ANY = 1 << 56
_SHORT_IDS = {
    _CLUSTER: dict.fromkeys((_SIMPLE_BLOCK, _GROUP, 0xAF, _VOID), _ANY)
    | dict.fromkeys((0xE7, 0xA7, 0xAB), 8)
    | {_CHECKSUM: 4},
    _GROUP: dict.fromkeys((_BLOCK, 0xA2, 0xA4, 0x8E, 0xC8, _VOID), _ANY)
    | dict.fromkeys((0x9B, 0xFA, 0xFB, 0xFD), 8)
    | {_CHECKSUM: 4},
}

# The longest id, the longest size, and the longest number of a track, with which a block begins.
_HEAD = 4 + 8 + 8


class DamagedError(Exception):
    """The structure of a file is broken; the message says where."""


def find_blocks(file: BinaryIO, size: int) -> dict[int, int]:
    """The position of what each block holds, and the number of the track that it belongs to.

    An element of open size, as in live recordings, ends the search.

    Raises:
        DamagedError: elements do not fit into one another, or a block belongs to no track.
    """
    blocks: dict[int, int] = {}
    tracks: set[int] = set()
    for element, start, length, head in _elements(file, size):
        if element in (_SIMPLE_BLOCK, _BLOCK):
            track, begins = ebml_number(head, 0)
            if tracks and track not in tracks:
                raise DamagedError(f"the block at byte {start:,} belongs to no track")
            if length > begins + 3:  # after a time and flags, a frame
                blocks[start] = track
        elif element == _TRACK_NUMBER:
            tracks.add(int.from_bytes(head[:length], "big"))
    return blocks


def _elements(file: BinaryIO, size: int) -> Iterator[tuple[int, int, int, bytes]]:
    """The elements up to the end of the segment: id, start and length of what they hold, and its first bytes."""
    position, parent_end, short_ids, outer = 0, size, None, []
    while position < parent_end:
        file.seek(position)
        head = file.read(_HEAD)
        id_size = 9 - head[0].bit_length()
        length, at = ebml_number(head, id_size)
        element = int.from_bytes(head[:id_size], "big")
        if length is None and at > id_size and element in _MAY_BE_OPEN:
            return
        start = position + at
        if (
            length is None
            or start + length > parent_end
            or id_size > 4
            or (id_size == 1 and short_ids and length > short_ids.get(element, -1))
        ):
            raise DamagedError(f"the element at byte {position:,} does not fit into its place")
        yield element, start, length, head[at:]
        if element in _ENTERED:
            outer.append((parent_end, short_ids))
            position, parent_end, short_ids = start, start + length, _SHORT_IDS.get(element)
        else:
            position = start + length
        while position == parent_end and len(outer) > 1:
            parent_end, short_ids = outer.pop()
        # What follows the segment is not the container's: the loop ends with it.


def ebml_number(data: bytes, position: int) -> tuple[int | None, int]:
    """A number of variable length and the position after it.

    None stands for a size that is left open, as in a live recording; with the position unchanged, for no number.
    """
    first = data[position] if position < len(data) else 0
    if 0x80 <= first < 0xFF:  # as are most
        return first - 0x80, position + 1
    size = 9 - first.bit_length()
    end = position + size
    if not first or end > len(data):
        return None, position
    value = int.from_bytes(data[position:end], "big")
    marker = 1 << 7 * size
    return (None if value == 2 * marker - 1 else value - marker), end

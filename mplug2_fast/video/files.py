"""What can be told of a file before it is decoded: that it is there, and that its end is.

Decoders go to the end of what they find and call it the end of the video. Whether something is missing only the
container knows, so its own account of its length is compared with the file's, and its index with its contents.
"""

from __future__ import annotations

import mmap
import os
import stat
from typing import BinaryIO

from mplug2_fast.video.avi import damaged_chunk
from mplug2_fast.video.matroska import ebml_number


def reason_not_readable(path: str) -> str | None:
    """Why a path cannot be a whole video or image file, in a few words; None where nothing speaks against it."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            return "is a directory, not a file"
        if not stat.S_ISREG(status.st_mode):
            return "is not a regular file"
        if status.st_size == 0:
            return "is empty"
        with open(path, "rb") as file:
            return _reason_not_whole(file, status.st_size)
    except FileNotFoundError:
        return "no such file"
    except PermissionError:
        return "may not be read: permission denied"
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _reason_not_whole(file: BinaryIO, size: int) -> str | None:
    announced = _announced_size(file, size)
    if announced > size:
        return f"is truncated: it has {size:,} bytes of at least {announced:,}"
    damaged = damaged_chunk(file, size)
    if damaged is not None:
        return f"is corrupt: the chunk at byte {damaged:,} is not what it should be"
    return None


def _announced_size(file: BinaryIO, size: int) -> int:
    """The least number of bytes that the container says it has; 0 where it does not say."""
    head = file.read(64)
    if head[4:8] in _BOXES:
        return _end_of_boxes(file, size)
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return _end_of_matroska(head)
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return _end_of_gif(file)
    return 0


# The boxes at the top of an mp4 or mov file; anything else after them is not the container's.
_BOXES = frozenset(
    b"ftyp styp moov mdat moof mfra free skip wide pnot uuid meta sidx ssix emsg prft udta".split(),
)


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    position = 0
    while position + 8 <= size:
        file.seek(position)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        if header[4:8] not in _BOXES or length == 0:  # 0: to the end of the file
            break
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length < 8:
            break
        position += length
    return position


def _end_of_matroska(head: bytes) -> int:
    """The end of the segment: the second element, after the EBML header."""
    header_size, position = ebml_number(head, 4)
    if header_size is None or head[position + header_size :][:4] != b"\x18\x53\x80\x67":
        return 0
    segment_size, position = ebml_number(head, position + header_size + 4)
    return 0 if segment_size is None else position + segment_size


def _end_of_gif(file: BinaryIO) -> int:
    """The position after the trailer, or one beyond the end of the file where that comes first."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _end_of_gif_data(data)


def _end_of_gif_data(data: mmap.mmap) -> int:
    beyond = len(data) + 1

    def after_colours(flags: int, position: int) -> int:
        return position + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)

    def after_blocks(position: int) -> int:
        while position < len(data) and data[position]:
            position += 1 + data[position]
        return position + 1

    if len(data) < 13:
        return beyond
    position = after_colours(data[10], 13)
    while position < len(data):
        kind = data[position]
        if kind == 0x21:  # an extension: a label, blocks
            position = after_blocks(position + 2)
        elif kind == 0x2C and position + 10 <= len(data):  # an image: colours, the code size, blocks
            position = after_blocks(after_colours(data[position + 9], position + 10) + 1)
        else:
            return beyond if kind == 0x2C else position + 1  # the trailer, or what the decoder will judge
    return beyond

"""The chunks of an AVI file, compared with its index.

Where the header of a chunk is damaged, libav looks for the next one that it recognises and leaves out what lies
between, without a word. The index that most files end with knows better.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

_HEAD = struct.Struct("<4sI4s")
_ENTRY = struct.Struct("<4sIII")
_VIDEO = (b"dc", b"db")


def damaged_chunk(file: BinaryIO, size: int) -> int | None:
    """The position of a chunk that is not what it should be; None where nothing speaks for damage."""
    file.seek(0)
    riff, length, kind = _HEAD.unpack(file.read(12).ljust(12))
    if riff + kind != b"RIFFAVI ":
        return None
    end = 8 + length
    position, frames, index = 12, 0, b""
    while position + 8 <= end and not index:
        file.seek(position)
        name, length, kind = _HEAD.unpack(file.read(12).ljust(12))
        if not name.isascii() or position + 8 + length > size:
            return position
        if (name, kind) == (b"LIST", b"movi"):
            frames = position + 8
        elif name == b"idx1":
            file.seek(position + 8)
            index = file.read(length // _ENTRY.size * _ENTRY.size)
        position += 8 + length + length % 2
    return _missing_chunk(file, frames, index)


def _missing_chunk(file: BinaryIO, frames: int, index: bytes) -> int | None:
    """The position of a chunk of video that the index names, and that is not there.

    An index that is wrong about most chunks is no witness: not every program writes it with care.
    """
    entries = [entry for entry in _ENTRY.iter_unpack(index) if entry[0][2:] in _VIDEO]
    for base in (frames, 0):  # what its positions are counted from
        missing = []
        for name, _, position, length in entries:
            file.seek(base + position)
            if file.read(8) != name + length.to_bytes(4, "little"):
                missing.append(base + position)
        if 2 * len(missing) < len(entries):
            return missing[0] if missing else None
    return None

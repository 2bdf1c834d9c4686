"""Checks the chunks of an AVI file: that the file does not end within one, and that all chunks of its index exist.

Where the header of a chunk is damaged, libav silently skips to the next one that it recognises. Most files end with an
index, which shows what was skipped. Some wrong sizes are harmless and do not count as damage: the size of the whole
file, the open sizes of a recording into a pipe, and zeros between chunks.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from mplug2_fast.video.limits import DamagedError, Guard, LimitError, Steps

_HEAD = struct.Struct("<4sI4s")
_ENTRY = np.dtype([("name", "V4"), ("flags", "<u4"), ("position", "<u4"), ("size", "<u4")])
_OPEN = (0, 0xFFFFFFFF)
_HAS_INDEX = 0x10
_LISTS = (b"LIST", b"RIFF")
_MAX_ZEROS = 1 << 20


@dataclass
class _Found:
    """What was found: the position of the frames, the index, and whether the header promises an index."""

    frames: int = 0
    index: bytes = b""
    promises_index: bool = False
    fillers: Steps | None = None


def check_chunks(file: BinaryIO, size: int, guard: Guard) -> None:
    """Follows the chunks of a file, if it is an AVI file.

    Raises:
        DamagedError: it is truncated, or a chunk is damaged.
        LimitError: there are too many chunks, or one is too large.
    """
    file.seek(0)
    riff, length, kind = _HEAD.unpack(file.read(12).ljust(12))
    if riff + kind != b"RIFFAVI ":
        return
    found, steps = _Found(), Steps(guard, size)
    found.fillers = Steps(guard, 0, 1 / 64)
    end = size if length in _OPEN else 8 + length
    _follow(file, size, 12, end, found, steps, guard)
    if end > size and found.promises_index and not found.index:
        raise DamagedError(f"is truncated: it has {size:,} bytes of at least {end:,}")
    position = _missing_chunk(file, found, steps)
    if position is not None:
        raise _not_a_chunk(position)


def _follow(file: BinaryIO, size: int, start: int, end: int, found: _Found, steps: Steps, guard: Guard) -> None:
    position = start
    while position + 8 <= min(end, size) and not found.index:
        steps.take()
        file.seek(position)
        name, length, kind = _HEAD.unpack(file.read(12).ljust(12))
        if name[:1] == b"\0":
            after = _after_zeros(file, position, min(end, size))
            if after is None:
                return
            if after == position or after - position > _MAX_ZEROS:
                raise _not_a_chunk(position)
            position = after
            continue
        is_frames = (name, kind) == (b"LIST", b"movi")
        if not name.isascii():
            raise _not_a_chunk(position)
        if position + 8 + length > size:
            if is_frames or name == b"RIFF":  # the recording was not finished, or still runs: check its chunks
                found.frames = found.frames or position + 8
                _follow(file, size, position + 12, size, found, steps, guard)
                if not found.index and length not in _OPEN:
                    raise DamagedError(f"is truncated: it has {size:,} bytes of at least {position + 8 + length:,}")
                return
            raise DamagedError(f"is truncated: it has {size:,} bytes of at least {position + 8 + length:,}")
        if is_frames:
            found.frames = position + 8
            if length == 0:
                _follow(file, size, position + 12, size, found, steps, guard)
                return
        if name == b"JUNK":
            found.fillers.take()
        _read_chunk(file, name, kind, position, length, found, steps, guard)
        position += 8 + length + length % 2


def _read_chunk(
    file: BinaryIO, name: bytes, kind: bytes, position: int, length: int, found: _Found, steps: Steps, guard: Guard
) -> None:
    limit = guard.limits.packet_bytes
    if length > limit and name not in (*_LISTS, b"JUNK"):
        raise LimitError(f"has a chunk of {length:,} bytes; the limit is {limit:,}")
    if name == b"LIST" and kind in (b"hdrl", b"strl"):
        end = position + 8 + length
        with suppress(DamagedError):  # libav checks headers itself
            _follow(file, end, position + 12, end, found, steps, guard)
    elif name == b"avih":
        file.seek(position + 8)
        found.promises_index = bool(int.from_bytes(file.read(16)[12:16], "little") & _HAS_INDEX)
    elif name == b"idx1":
        file.seek(position + 8)
        found.index = file.read(length // _ENTRY.itemsize * _ENTRY.itemsize)


def _after_zeros(file: BinaryIO, position: int, end: int) -> int | None:
    """The position of the first byte that is not zero; None if all are zero, up to the end or `_MAX_ZEROS`."""
    file.seek(position)
    for start in range(position, min(end, position + 2 * _MAX_ZEROS), 1 << 16):
        data = file.read(1 << 16)
        rest = data.lstrip(b"\0")
        if rest:
            return min(start + len(data) - len(rest), end)
    return None if end <= position + _MAX_ZEROS else end


def _missing_chunk(file: BinaryIO, found: _Found, steps: Steps) -> int | None:
    """The position of the first chunk of video that the index has and the file lacks.

    An index that is wrong about most chunks is ignored, because some programs write wrong indices.
    """
    letters = np.frombuffer(found.index, np.uint8).reshape(-1, _ENTRY.itemsize)[:, 2:4]
    is_video = (letters[:, 0] == ord("d")) & ((letters[:, 1] == ord("c")) | (letters[:, 1] == ord("b")))
    entries = np.frombuffer(found.index, _ENTRY)[is_video]
    for base in (found.frames, 0):  # positions count from the frames or from the start of the file
        first, missing = None, 0
        for start in range(0, len(entries), 1 << 16):
            for name, _, position, length in entries[start : start + (1 << 16)].tolist():
                steps.take()
                file.seek(base + position)
                if file.read(8) != name + length.to_bytes(4, "little"):
                    first, missing = base + position if first is None else first, missing + 1
        if 2 * missing < len(entries):
            return first
    return None


def _not_a_chunk(position: int) -> DamagedError:
    return DamagedError(f"is corrupt: the chunk at byte {position:,} is damaged")

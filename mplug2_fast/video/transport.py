"""Checks whether packets of an MPEG transport stream are missing.

Packets have counters. In joined streams the counters start again, and libav reports the packet before the joint as
damaged although nothing is missing.
"""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

from mplug2_fast.video.limits import Guard

_SIZES = (188, 192, 204)
_CHUNK = 1 << 16


def missing_packets(file: BinaryIO, pid: int, guard: Guard) -> bool:
    """Whether packets of a stream are missing, by their counters.

    A counter may jump at the start of a stream: where a table of programs (PID 0) comes before a packet that starts a
    picture. Packets that are marked as damaged count as missing.
    """
    size, offset = _packet_size(file)
    if size is None:
        return True
    file.seek(offset)
    last, table_since = None, False
    while data := file.read(size * _CHUNK):
        guard.check()
        whole = np.frombuffer(data[: len(data) // size * size], np.uint8).reshape(-1, size)
        packets = whole[:, 4:] if size == 192 else whole
        if not (packets[:, 0] == 0x47).all():
            return True
        pids = (packets[:, 1].astype(np.int32) & 0x1F) << 8 | packets[:, 2]
        relevant = packets[(pids == 0) | (pids == pid), 1:4].tolist()
        for high, low, flags in relevant:
            packet_pid, starts, damaged = (high & 0x1F) << 8 | low, high & 0x40, high & 0x80
            if packet_pid == 0:
                table_since = True
            if packet_pid != pid:
                continue
            if damaged:
                return True
            if not flags & 0x10:  # no data
                continue
            counter = flags & 15
            jumps = last is not None and counter not in (last, (last + 1) & 15)
            if jumps and not (starts and table_since):
                return True
            last, table_since = counter, False
    return False


def _packet_size(file: BinaryIO) -> tuple[int | None, int]:
    """The distance between packets, and the position of the first."""
    file.seek(0)
    head = file.read(204 * 8)
    for size in _SIZES:
        for offset in range(size):
            marks = head[offset + (4 if size == 192 else 0) :: size]
            if len(marks) > 1 and not marks.strip(b"\x47"):
                return size, offset
    return None, 0

"""Limits on the time, pixels, frames and memory of one file.

A few bytes of a file can claim billions of frames or pixels. Claims are compared with the limits, and with the size of
the file, before a decoder uses them.
"""

from __future__ import annotations

import errno
import math
import os
import time
from dataclasses import dataclass

# libav counts the bits of a packet in 32 bits, and its parsers crash beyond that.
_MAX_PACKET = 2**28 - 2**16
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Limits:
    """Limits on reading one file. A file that exceeds a limit is a `VideoError`; None means no limit.

    Args:
        seconds: for one call that reads or decodes. For `VideoReader.batches` and windows, the time starts again after
            each frame. `DecodePool` has its own `timeout` instead.
        pixels: of one frame.
        frames: of one file; also limits its index and its structure.
        memory: bytes for decoding. Exact in the workers of `DecodePool`. In the calling process it is compared with an
            estimate, and with the memory of the process while it decodes large frames.
    """

    seconds: float | None = 60.0
    pixels: int | None = 2**27
    frames: int | None = 2**22
    memory: int | None = 2**31

    def __post_init__(self) -> None:
        for name in ("seconds", "pixels", "frames", "memory"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be a positive number, or None for no limit, not {value!r}")

    @property
    def packet_bytes(self) -> int:
        """Maximum bytes of one packet, or of one part of the container that is held in memory."""
        return _MAX_PACKET if self.memory is None else min(self.memory // 4, _MAX_PACKET)


class LimitError(Exception):
    """A file exceeds a limit; the message states which, and how to raise it."""


class DamagedError(Exception):
    """The structure of a file is damaged; the message states where."""


class Guard:
    """Checks the limits of one call."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = Limits() if limits is None else limits
        self._cancelled = False
        self._memory_before: int | None = None
        self.restart()

    def restart(self) -> None:
        """Restarts the time limit."""
        seconds = self.limits.seconds
        self._ends = None if seconds is None else time.monotonic() + seconds

    def cancel(self) -> None:
        """Makes the next check raise; may be called from another thread."""
        self._cancelled = True

    @property
    def seconds_left(self) -> float | None:
        return None if self._ends is None else max(self._ends - time.monotonic(), 0.001)

    def watch_memory(self) -> None:
        """From now on, also checks the memory of the process."""
        if self._memory_before is None and self.limits.memory is not None:
            self._memory_before = _resident_bytes()

    def check(self) -> None:
        """Raises `LimitError` if the time or memory limit is exceeded."""
        if self._cancelled:
            raise LimitError("decoding was cancelled")
        if self._ends is not None and time.monotonic() > self._ends:
            raise LimitError(f"takes too long: stopped after {self.limits.seconds:g} s; raise Limits.seconds")
        if self._memory_before is not None and _resident_bytes() - self._memory_before > self.limits.memory:
            raise too_much_memory(self.limits.memory)


class Steps:
    """Counts the parts of a container as they are read, and limits their number.

    The maximum is a share of the limit on frames, plus a number that grows with the size of the file.
    """

    def __init__(self, guard: Guard, file_size: int, share: float = 0.5) -> None:
        self._guard = guard
        frames = guard.limits.frames
        self._max_count = math.inf if frames is None else int(frames * share) + file_size // 256
        self._count = 0

    def take(self) -> None:
        self._count += 1
        if self._count & 4095 == 0:
            self._guard.check()
            if self._count > self._max_count:
                raise LimitError(f"has more than {self._max_count:,} parts in its container; raise Limits.frames")


class LimitedFile:
    """A file that libav reads through Python, which stops reading when too many bytes give no packet.

    For files whose structure does not show how many bytes precede the next packet.
    """

    def __init__(self, name: str, guard: Guard) -> None:
        self.name = name
        self._file = open(name, "rb", buffering=0)  # noqa: SIM115  (closed by `close`)
        self._guard = guard
        self._read = 0
        memory = guard.limits.memory
        self._max_read = _MAX_PACKET if memory is None else min(memory // 8, _MAX_PACKET)

    def found_packet(self) -> None:
        self._read = 0

    def read(self, size: int) -> bytes:
        self._guard.check()
        self._read += size
        if self._read > self._max_read:
            raise LimitError(f"has no frame or sound within {self._max_read:,} bytes; raise Limits.memory")
        return self._file.read(size)

    def seek(self, position: int, whence: int = 0) -> int:
        """Returns the new position, or a negative error number as libav's own files do.

        A damaged container may contain a position before the start.
        """
        try:
            return self._file.seek(position, whence)
        except OSError as error:
            return -(error.errno or errno.EIO)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def too_much_memory(limit: int) -> LimitError:
    return LimitError(f"needs more than {limit / 2**30:.3g} GiB of memory to decode; raise Limits.memory")


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE

"""Limits on what one file may cost: time, pixels, frames and memory.

A few bytes of a file can claim billions of frames or pixels. Claims are compared with the limits, and with the size of
the file, before a decoder acts on them.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Limits:
    """What reading one file may cost. A file that exceeds a limit is a `VideoError`; None means no limit.

    Args:
        seconds: for one call that reads or decodes. `VideoReader.batches` and windows start again with each frame that
            they give. `DecodePool` has its own `timeout` instead.
        pixels: of one frame.
        frames: of one file; also bounds its index and its structure.
        memory: bytes that decoding may take. Exact in the workers of `DecodePool`. In the calling process it is
            compared with an estimate, and with the memory that the process takes while it decodes large frames.
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
    def packet_bytes(self) -> int | None:
        """Bytes of one packet, or one part of the container that is held in memory."""
        return None if self.memory is None else self.memory // 4

    def steps(self, file_size: int) -> float:
        """Parts of a container that may be looked at one by one."""
        return float("inf") if self.frames is None else self.frames // 2 + file_size // 256


class LimitError(Exception):
    """A file exceeds a limit; the message says which, and how to raise it."""


class DamagedError(Exception):
    """The structure of a file is broken; the message says where."""


class Guard:
    """The limits of one call, and the time and memory that it has used."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = Limits() if limits is None else limits
        self._cancelled = False
        self._memory_before: int | None = None
        self.restart()

    def restart(self) -> None:
        """Start the time limit again."""
        seconds = self.limits.seconds
        self._ends = None if seconds is None else time.monotonic() + seconds

    def cancel(self) -> None:
        """Have the next check raise; may be called from another thread."""
        self._cancelled = True

    @property
    def seconds_left(self) -> float | None:
        return None if self._ends is None else max(self._ends - time.monotonic(), 0.001)

    def watch_memory(self) -> None:
        """Compare the memory of the process with the limit from now on."""
        if self._memory_before is None and self.limits.memory is not None:
            self._memory_before = _resident_bytes()

    def check(self) -> None:
        """Raises `LimitError` when the time or the memory is used up."""
        if self._cancelled:
            raise LimitError("decoding was cancelled")
        if self._ends is not None and time.monotonic() > self._ends:
            raise LimitError(f"takes too long: stopped after {self.limits.seconds:g} s; raise Limits.seconds")
        if self._memory_before is not None and _resident_bytes() - self._memory_before > self.limits.memory:
            raise too_much_memory(self.limits.memory)


class Steps:
    """Counts the parts of a container that are looked at."""

    def __init__(self, guard: Guard, file_size: int) -> None:
        self._guard = guard
        self._most = guard.limits.steps(file_size)
        self._count = 0

    def take(self) -> None:
        self._count += 1
        if self._count & 4095 == 0:
            self._guard.check()
            if self._count > self._most:
                raise LimitError(f"has more than {int(self._most):,} parts in its container; raise Limits.frames")


def too_much_memory(limit: int) -> LimitError:
    return LimitError(f"needs more than {limit / 2**30:.3g} GiB of memory to decode; raise Limits.memory")


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE

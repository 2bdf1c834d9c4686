"""How long a call takes, on the device that it runs on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch


class CpuClock:
    """Wall time. Calls take turns with inputs that lie apart, so that none finds its own in the cache."""

    rotates = True
    slow = math.inf

    def __call__(self, call: Callable[[], Any]) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class CudaClock:
    """Time between two events on the device, which finds nothing in its L2 cache, and waits for nothing: what is timed
    is queued while the device still sleeps, so that the time of launching does not count.

    Attributes:
        slow: seconds above which a call is timed once; only a loop over pixels is so slow.
    """

    rotates = False
    slow = 0.5
    _FLUSHED_BYTES, _SLEEP_CYCLES = 1 << 28, 1_000_000

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        size = max(self._FLUSHED_BYTES, 2 * torch.cuda.get_device_properties(self.device).L2_cache_size)
        self.flushed = torch.empty(size, dtype=torch.uint8, device=self.device)

    def __call__(self, call: Callable[[], Any]) -> float:
        """Seconds of one call."""
        with torch.cuda.device(self.device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flushed.zero_()
            torch.cuda._sleep(self._SLEEP_CYCLES)
            begin.record()
            call()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1e3


Clock = CpuClock | CudaClock


def clock(device: str) -> Clock:
    return CudaClock(device) if device.startswith("cuda") else CpuClock()

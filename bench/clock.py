"""How long a call takes, on the device that it runs on."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from bench.case import Call

MODES = ("cold", "warm", "graph")
"""Inputs not in the cache; inputs in the cache; on CUDA, replayed from a CUDA graph with inputs not in the cache."""


class CpuClock:
    """Wall time.

    Attributes:
        rotates: whether calls should take turns with inputs that lie apart, so that none finds its own in the cache.
    """

    slow = math.inf

    def __init__(self, mode: str = "cold") -> None:
        self.rotates = mode == "cold"

    def __call__(self, call: Call) -> float:
        """Seconds of one call."""
        given = call.before()
        start = time.perf_counter()
        result = call.run(*given)
        seconds = time.perf_counter() - start
        del result  # outside the clock
        return seconds


class CudaClock:
    """Time between two events on the device, which waits for nothing: what is timed is queued while the device still
    sleeps, so that the time of launching does not count. The L2 cache is flushed before, unless the mode is "warm".

    Attributes:
        slow: seconds above which a call is timed once; only a loop over pixels is so slow.
    """

    rotates = False
    slow = 0.5
    _FLUSHED_BYTES, _SLEEP_CYCLES, _WARM_UP = 1 << 28, 1_000_000, 3

    def __init__(self, device: str, mode: str = "cold") -> None:
        self.device, self.graphs = torch.device(device), mode == "graph"
        self.flushed = None
        self.captured: dict[Call, tuple[torch.cuda.CUDAGraph, Any]] = {}
        if mode != "warm":
            size = max(self._FLUSHED_BYTES, 2 * torch.cuda.get_device_properties(self.device).L2_cache_size)
            self.flushed = torch.empty(size, dtype=torch.uint8, device=self.device)

    def __call__(self, call: Call) -> float:
        """Seconds of one call."""
        with torch.cuda.device(self.device):
            if self.graphs and not call.replays:
                run, given = self._graph(call).replay, ()
            else:
                run, given = call.run, call.before()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if self.flushed is not None:
                self.flushed.zero_()
            torch.cuda._sleep(self._SLEEP_CYCLES)
            begin.record()
            run(*given)
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def _graph(self, call: Call) -> torch.cuda.CUDAGraph:
        """The call, captured once. Its inputs are those of the capture."""
        if call not in self.captured:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(self._WARM_UP):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            given, graph = call.before(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = call.run(*given)
            self.captured[call] = (graph, (given, result))  # a graph does not keep alive what it reads and writes
        return self.captured[call][0]


Clock = CpuClock | CudaClock


def clock(device: str, mode: str = "cold") -> Clock:
    """Raises `ValueError` for graphs on the CPU."""
    if device.startswith("cuda"):
        return CudaClock(device, mode)
    if mode == "graph":
        raise ValueError("CUDA graphs need --device cuda")
    return CpuClock(mode)

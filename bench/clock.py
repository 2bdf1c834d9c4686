"""Clocks for both devices, and ways that take turns under them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.case import OURS, Call

MODES = ("cold", "warm", "graph")
"""Inputs outside the cache; inputs in the cache; on CUDA, a replayed graph with inputs outside the cache."""


class CpuClock:
    """Wall time.

    Attributes:
        rotates: whether calls should alternate between distant inputs, so that none is in the cache.
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
    """Time between two events on the device. Work is queued while the device sleeps, so launch time does not count.
    Except in mode "warm", the L2 cache is flushed first.

    Attributes:
        slow: seconds above which a call is timed once. Only a loop over pixels is that slow.
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
        """The call, captured once with the inputs of that time."""
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
            self.captured[call] = (graph, (given, result))  # a graph does not keep its tensors alive
        return self.captured[call][0]


Clock = CpuClock | CudaClock


def clock(device: str, mode: str = "cold") -> Clock:
    """Raises `ValueError` for graphs on the CPU."""
    if device.startswith("cuda"):
        return CudaClock(device, mode)
    if mode == "graph":
        raise ValueError("CUDA graphs need --device cuda")
    return CpuClock(mode)


@dataclass(frozen=True)
class Budget:
    """The time limit of a case.

    Attributes:
        seconds: for each way. fewest, most: number of turns.
        slow: seconds per call above which a baseline is timed once.
    """

    seconds: float = 1.5
    fewest: int = 5
    most: int = 300
    slow: float = 5.0


@dataclass(frozen=True)
class Turns:
    """Seconds of each way, turn by turn."""

    seconds: Mapping[str, list[float]]

    def median(self, way: str = OURS) -> float:
        return statistics.median(self.seconds[way])

    def spread(self, way: str = OURS) -> float:
        """Half the distance between the quartiles, over the median; 0 for a single run."""
        if len(self.seconds[way]) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds[way], n=4)
        return (high - low) / 2 / self.median(way)

    def ratio(self, way: str) -> float:
        """How many times faster ours is: the median over the turns, or the ratio of medians if their numbers differ."""
        ours, other = self.seconds[OURS], self.seconds[way]
        if len(ours) != len(other):
            return statistics.median(other) / statistics.median(ours)
        return statistics.median(b / a for a, b in zip(ours, other, strict=True))


def together(parts: Sequence[Turns]) -> Turns:
    """The turns of several processes."""
    return Turns({way: [each for part in parts for each in part.seconds[way]] for way in parts[0].seconds})


def take(ways: Mapping[str, list[Call]], clock: Clock, budget: Budget) -> Turns:
    """Warms each way up on all its inputs, which also compiles it, then times the ways in turns. A slow baseline runs
    twice, and its second run counts."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    turn_takes = 0.0
    for way, (first, *others) in ways.items():
        first()
        taken = clock(first)
        if taken > min(clock.slow, budget.slow) and way != OURS:
            seconds[way].append(taken)
            continue
        turn_takes += taken
        for call in others:
            call()
    repeated = [way for way in ways if not seconds[way]]
    turns = int(budget.seconds * len(repeated) / max(turn_takes, 1e-9))
    for turn in range(min(budget.most, max(budget.fewest, turns))):
        for way in repeated:
            calls = ways[way]
            seconds[way].append(clock(calls[turn % len(calls)]))
    return Turns(seconds)

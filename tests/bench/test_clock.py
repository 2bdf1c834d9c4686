"""Clocks, with a stand-in for a CUDA device, and turns under a clock that calls control."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from bench import ceilings, clock
from bench.case import OURS, Call
from bench.clock import Budget, Turns, take, together


@pytest.fixture
def device_log(monkeypatch):
    """The calls of a CUDA device in order. Each event takes 2 ms."""
    log, now = [], iter(range(1000))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now)
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, other):
            return 2.0 * (other.at - self.at)

    class Flushed:
        def zero_(self):
            log.append("flush")

    empty = torch.empty
    properties = SimpleNamespace(L2_cache_size=1 << 28)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    monkeypatch.setattr(
        torch,
        "empty",
        lambda size, dtype, device: Flushed() if size >= 2 << 28 else empty(size, dtype=dtype, device=device),
    )
    return log


def test_cuda_events_time_a_call_with_a_cold_cache(device_log):
    timer = clock.clock("cuda")
    call = Call(lambda: device_log.append("call"), lambda: device_log.append("before") or ())
    assert timer(call) == pytest.approx(2e-3)
    assert device_log == ["before", "flush", "sleep", "record", "call", "record", "synchronize"]


def test_a_graph_is_captured_once_and_replayed(device_log, monkeypatch):
    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            device_log.append("replay")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    timer, call = clock.clock("cuda", "graph"), Call(lambda: device_log.append("call"))
    assert timer(call) == timer(call) == pytest.approx(2e-3)
    replayed = ["flush", "sleep", "record", "replay", "record", "synchronize"]
    assert device_log == ["call"] * 4 + replayed + replayed


def test_a_call_that_replays_a_graph_is_not_captured(device_log):
    clock.clock("cuda", "graph")(Call(lambda: device_log.append("call"), replays=True))
    assert device_log == ["flush", "sleep", "record", "call", "record", "synchronize"]


def test_on_a_cpu_preparation_is_not_timed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    call = Call(lambda given: passes(given), lambda: (passes(100.0) or 2.0,))
    assert clock.clock("cpu")(call) == 2.0
    assert clock.clock("cpu").rotates
    assert not clock.clock("cpu", "warm").rotates


def test_cuda_events_time_ceilings(device_log):
    assert ceilings.timed(lambda: device_log.append("call"), "cuda:0") == pytest.approx(2e-3)
    assert device_log == ["record", "call", "record", "synchronize"]


class Clock:
    """Each call returns its own time."""

    rotates, slow = True, 0.5

    def __init__(self):
        self.order = []

    def __call__(self, call):
        name, seconds = call()
        self.order.append(name)
        return seconds


def calls(name, *seconds):
    return [Call(lambda each=each: (name, each)) for each in seconds]


def test_ways_take_turns_and_alternate_inputs():
    clock = Clock()
    turns = take({OURS: calls(OURS, 0.1, 0.2), "eager": calls("eager", 0.4, 0.4)}, clock, Budget(1.0, fewest=3))
    assert clock.order[:6] == [OURS, "eager"] * 3
    assert turns.seconds[OURS][:4] == [0.1, 0.2, 0.1, 0.2]
    assert turns.ratio("eager") == pytest.approx(3.0)  # of 4, 2, 4, 2, ...


def test_a_drifting_machine_does_not_change_a_ratio():
    drift = [1.0 + turn / 10 for turn in range(40)]
    slower = [3 * seconds for seconds in drift]
    assert Turns({OURS: drift, "eager": slower}).ratio("eager") == pytest.approx(3.0)
    assert Turns({OURS: drift, "eager": [3.0]}).ratio("eager") == pytest.approx(3.0 / 2.95)


def test_turns_of_several_processes():
    parts = [Turns({OURS: [1.0], "eager": [2.0]}), Turns({OURS: [3.0, 1.0], "eager": [9.0, 4.0]})]
    assert together(parts).seconds == {OURS: [1.0, 3.0, 1.0], "eager": [2.0, 9.0, 4.0]}
    assert together(parts).ratio("eager") == 3.0


def test_slow_baselines_are_timed_once_and_ours_is_repeated():
    ways = {OURS: calls(OURS, 0.6), "eager": calls("eager", 0.7), "torch": calls("torch", 0.3)}
    turns = take(ways, Clock(), Budget(1.0, fewest=5))
    assert turns.seconds["eager"] == [0.7]
    assert len(turns.seconds[OURS]) == len(turns.seconds["torch"]) == 5
    assert turns.ratio("eager") == pytest.approx(0.7 / 0.6)


def test_spread_is_half_the_interquartile_range():
    turns = take({OURS: calls(OURS, 1.0, 2.0, 3.0, 4.0)}, Clock(), Budget(0.0, fewest=4))
    assert turns.spread() == pytest.approx((3.75 - 1.25) / 2 / 2.5)
    assert take({OURS: calls(OURS, 1.0)}, Clock(), Budget(0.0, fewest=1)).spread() == 0.0

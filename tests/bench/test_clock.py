"""Clocks: a CUDA device is stood in for."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from bench import ceilings, clock
from bench.case import Call


@pytest.fixture
def device_log(monkeypatch):
    """What a CUDA device would be asked to do, in order; time on it passes 2 ms an event."""
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


def test_on_cuda_a_call_is_timed_between_events_with_a_cold_cache(device_log):
    timer = clock.clock("cuda")
    call = Call(lambda: device_log.append("call"), lambda: device_log.append("before") or ())
    assert timer(call) == pytest.approx(2e-3)
    assert device_log == ["before", "flush", "sleep", "record", "call", "record", "synchronize"]


def test_a_warm_clock_leaves_the_cache_alone(device_log):
    clock.clock("cuda", "warm")(Call(lambda: device_log.append("call")))
    assert device_log == ["sleep", "record", "call", "record", "synchronize"]


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


def test_what_replays_a_graph_of_its_own_is_not_captured(device_log):
    clock.clock("cuda", "graph")(Call(lambda: device_log.append("call"), replays=True))
    assert device_log == ["flush", "sleep", "record", "call", "record", "synchronize"]


def test_graphs_are_for_cuda():
    with pytest.raises(ValueError, match="CUDA graphs need --device cuda"):
        clock.clock("cpu", "graph")


def test_on_a_cpu_what_comes_before_is_not_timed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    call = Call(lambda given: passes(given), lambda: (passes(100.0) or 2.0,))
    assert clock.clock("cpu")(call) == 2.0
    assert clock.clock("cpu").rotates
    assert not clock.clock("cpu", "warm").rotates


def test_ceilings_on_cuda_are_timed_between_events(device_log):
    assert ceilings.timed(lambda: device_log.append("call"), "cuda:0") == pytest.approx(2e-3)
    assert device_log == ["record", "call", "record", "synchronize"]

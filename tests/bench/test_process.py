"""Processes: their results, and how they end."""

import math
import os
from pathlib import Path

import pytest
import torch

from bench import memory, process
from bench.measure import Measured
from bench.plan import Spec
from bench.process import Process, ProcessError
from bench.worker import Worker
from mplug2_fast import MPlug2Config


def spec(folder, implementation):
    return Spec(implementation, "float32", "cpu", 1, MPlug2Config.preset("tiny"), 1, 1, str(folder))


def test_a_function_runs_in_another_process():
    assert process.run("it", max, 1, 2) == 2
    assert process.run("it", os.getpid) != os.getpid()
    with pytest.raises(ProcessError, match="it: ValueError: math domain error"):
        process.run("it", math.sqrt, -1.0)
    with pytest.raises(ProcessError, match="it: the process died of SIGABRT"):
        process.run("it", os.abort)


def test_a_worker_that_fails_says_why(tmp_path):
    with (
        Process("slow", Worker, spec(tmp_path, "slow"), preloaded=True) as slow,
        Process("fast", Worker, spec(tmp_path, "fast"), preloaded=True) as fast,
    ):
        with pytest.raises(ProcessError, match="slow: KeyError: 'slow'"):
            slow.ready()
        fast.ready()
        torch.save(torch.zeros(1, 3, 1, 16, 16), tmp_path / "video.pt")
        with pytest.raises(ProcessError, match=r"fast: ValueError: .*32×32"):
            fast.call(Worker.run, "vision")


def test_a_killed_process_is_noticed():
    with Process("it").ready() as killed:
        killed.process.kill()
        with pytest.raises(ProcessError, match="it: the process was killed"):
            killed.call(os.getpid)


def test_memory_is_left_out_where_the_system_does_not_report_it(monkeypatch):
    def refuse(self, text):
        raise PermissionError(self)

    monkeypatch.setattr(Path, "write_text", refuse)
    assert not memory.reset_peak("cpu")
    measured = Measured("eager")
    reply = {"seconds": 1.0, "peak_memory_bytes": None, "added_memory_bytes": None, "relative_error": 0.0}
    measured.add(reply)
    assert (measured.peak_memory_bytes, measured.added_memory_bytes) == (None, None)
    measured.warm_up({**reply, "peak_memory_bytes": 9, "added_memory_bytes": 4})
    measured.add({**reply, "peak_memory_bytes": 5, "added_memory_bytes": 2})
    assert (measured.peak_memory_bytes, measured.added_memory_bytes) == (5, 4)
    assert measured.seconds == [1.0, 1.0]

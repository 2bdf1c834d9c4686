"""What a worker tells of memory, and how it ends."""

from pathlib import Path

import pytest
import torch

from bench import memory
from bench.measure import Measured
from bench.workers import Client, Spec, WorkerError
from mplug2_fast import MPlug2Config


def test_a_system_that_cannot_tell_leaves_memory_out(monkeypatch):
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


def spec(tmp_path, implementation):
    return Spec(implementation, "float32", "cpu", 1, MPlug2Config.preset("tiny").to_dict(), 1, 1, str(tmp_path))


def test_a_worker_that_fails_says_why(tmp_path):
    with Client.start(spec(tmp_path, "slow")) as slow, Client.start(spec(tmp_path, "fast")) as client:
        with pytest.raises(WorkerError, match="slow float32: KeyError: 'slow'"):
            slow.ready()
        client.ready()
        torch.save(torch.zeros(1, 3, 1, 16, 16), tmp_path / "video.pt")
        with pytest.raises(WorkerError, match=r"fast float32: ValueError: .*32×32"):
            client.call("run", "vision")


def test_a_worker_that_dies_is_noticed(tmp_path):
    with Client.start(spec(tmp_path, "fast")).ready() as client:
        client.process.kill()
        with pytest.raises(WorkerError, match="fast float32: the process was killed"):
            client.call("describe")

"""What a worker tells of memory."""

import mmap
from pathlib import Path

from bench import worker
from bench.measure import Measured


def test_peak_memory_is_of_the_run():
    assert worker.reset_peak_memory("cpu")
    before = worker.peak_memory("cpu")
    with mmap.mmap(-1, 200 << 20) as block:  # which no allocator keeps
        for _ in range(200):
            block.write(b"x" * (1 << 20))
        assert worker.peak_memory("cpu") > before + (150 << 20)
    assert worker.reset_peak_memory("cpu")
    assert worker.peak_memory("cpu") < before + (150 << 20)


def test_a_system_that_cannot_tell_leaves_memory_out(monkeypatch):
    def refuse(self, text):
        raise PermissionError(self)

    monkeypatch.setattr(Path, "write_text", refuse)
    assert not worker.reset_peak_memory("cpu")
    measured = Measured("eager")
    measured.add({"seconds": 1.0, "peak_memory_bytes": None, "relative_error": 0.0})
    assert measured.peak_memory_bytes is None
    measured.add({"seconds": 1.0, "peak_memory_bytes": 5, "relative_error": 0.0})
    assert measured.peak_memory_bytes == 5

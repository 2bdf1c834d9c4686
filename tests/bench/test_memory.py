import mmap

import torch

from bench import memory, step_memory
from mplug2_fast import MPlug2Config


def test_peak_memory_is_of_the_run():
    assert memory.reset_peak("cpu")
    before = memory.peak("cpu")
    with mmap.mmap(-1, 200 << 20) as block:  # no allocator keeps it
        for _ in range(200):
            block.write(b"x" * (1 << 20))
        assert memory.peak("cpu") > before + (150 << 20)
    assert memory.reset_peak("cpu")
    assert memory.peak("cpu") < before + (150 << 20)


def test_memory_of_cuda_graphs_counts(monkeypatch):
    segments = [
        {"device": 0, "segment_pool_id": (0, 0), "total_size": 100, "allocated_size": 10},
        {"device": 0, "segment_pool_id": (0, 1), "total_size": 50, "allocated_size": 20},
        {"device": 1, "segment_pool_id": (0, 1), "total_size": 9, "allocated_size": 0},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500)
    assert memory.peak("cuda") == 1030
    assert memory.held("cuda") == 530
    assert memory.peak("cuda:1") == 1009


def test_a_large_step_fits_a_24_gb_card():
    config = MPlug2Config.preset("large")
    assert sum(step_memory.count(config, config.vision.num_frames).values()) < 12e9  # half of the card

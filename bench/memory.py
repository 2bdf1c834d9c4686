"""Peak memory: of the whole process on a CPU; of the allocator on CUDA, plus what CUDA graphs keep, because replays
write there without allocating."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch


def reset_peak(device: str) -> bool:
    """False if the system does not report a process's peak memory, as in some sandboxes."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak(device: str) -> int:
    """Bytes since the last reset."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) + _kept_by_graphs(device)
    return _status("VmHWM")


def held(device: str) -> int:
    """Bytes now."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device) + _kept_by_graphs(device)
    return _status("VmRSS")


def _kept_by_graphs(device: str) -> int:
    """The memory of CUDA graphs that does not count as allocated."""
    index = torch.device(device).index or 0
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == index and tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
    )


def give_back() -> None:
    """Returns freed memory to the system, if glibc can, and to the GPU."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024

"""Peak memory: of the whole process on a CPU, of the allocator on CUDA."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch


def reset_peak(device: str) -> bool:
    """False where the system cannot tell a process's peak memory, as in some sandboxes."""
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
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else _status("VmHWM")


def held(device: str) -> int:
    """Bytes now."""
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else _status("VmRSS")


def give_back() -> None:
    """What is freed goes back to the system, where glibc is there to do it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024

"""Releases the pages of a memory-mapped file after they were read, so that a large file does not fill the memory."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import torch

_PROC_MAPS = Path("/proc/self/maps")


class PageReleaser:
    """Releases the pages under tensors that are views of one memory-mapped file.

    The kernel drops the pages and reads them from the file again if they are used later. Other memory would lose its
    contents, so only addresses within the mappings of this file are released. Linux only; elsewhere it does nothing.
    """

    def __init__(self, file: Path) -> None:
        self._ranges: list[tuple[int, int]] = []
        if not sys.platform.startswith("linux") or not _PROC_MAPS.exists():
            return
        file = file.resolve()
        inode = file.stat().st_ino
        for line in _PROC_MAPS.read_text(errors="replace").splitlines():
            fields = line.split(maxsplit=5)  # span, permissions, offset, device, inode, path
            if len(fields) == 6 and int(fields[4]) == inode and fields[5] == str(file):
                start, end = (int(address, 16) for address in fields[0].split("-"))
                self._ranges.append((start, end))
        self._madvise = ctypes.CDLL(None, use_errno=True).madvise
        self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def __call__(self, tensor: torch.Tensor) -> None:
        """Releases all pages that contain a part of `tensor`."""
        start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        end = start + size
        page = mmap.PAGESIZE
        for low, high in self._ranges:
            if low <= start and end <= high:
                first, last = max(start // page * page, low), min(-(-end // page) * page, high)
                if last > first:
                    self._madvise(first, last - first, mmap.MADV_DONTNEED)
                return

"""Finds media files that cannot be read, and files with the same contents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from mplug2_fast.errors import VideoError

Progress = Callable[[int, int], None]
"""Called with the number of files done and the number of all files."""

_END = 2**16
"""Bytes at both ends of a file that are compared before the whole file."""


def unreadable(
    paths: Sequence[str], *, decode: bool, num_workers: int, timeout: float, num_frames: int, progress: Progress | None
) -> Iterator[tuple[str, str]]:
    """(path, reason) of each file that is missing or cannot be read.

    Args:
        decode: decode `num_frames` frames, in other processes. Otherwise read only the structure of the file.
        num_workers: number of processes or threads.
        timeout: seconds for one file.
    """
    results = _decoded(paths, num_workers, timeout, num_frames) if decode else _opened(paths, num_workers, timeout)
    for done, (path, error) in enumerate(results, 1):
        if progress is not None:
            progress(done, len(paths))
        if error is not None:
            yield path, str(error).removeprefix(f"{path}: ")


def _decoded(
    paths: Sequence[str], num_workers: int, timeout: float, num_frames: int
) -> Iterator[tuple[str, VideoError | None]]:
    import torch

    from mplug2_fast.video import DecodePool

    workers = max(1, min(num_workers, len(paths)))
    with DecodePool(workers, timeout=timeout, num_frames=num_frames, image_size=16, dtype=torch.uint8) as pool:
        for clip in pool.clips(paths):
            yield paths[clip.index], clip.error


def _opened(paths: Sequence[str], num_workers: int, timeout: float) -> Iterator[tuple[str, VideoError | None]]:
    from mplug2_fast.video import Limits, VideoReader

    def opened(path: str) -> tuple[str, VideoError | None]:
        try:
            with VideoReader(path, limits=Limits(seconds=timeout)):
                return path, None
        except VideoError as error:
            return path, error

    with ThreadPoolExecutor(num_workers) as threads:
        yield from threads.map(opened, paths)


def same_contents(paths: Sequence[str]) -> list[list[str]]:
    """Groups of files with the same contents. Files that cannot be read are in no group.

    Only files of the same size are read, and the whole files only if both ends are the same.
    """
    groups: list[list[str]] = [list(paths)]
    for key in (_file_size, _ends, _contents):
        split: dict[object, list[str]] = {}
        for number, group in enumerate(groups):
            for path in group:
                try:
                    split.setdefault((number, key(path)), []).append(path)
                except OSError:
                    continue
        groups = [group for group in split.values() if len(group) > 1]
    return groups


def _file_size(path: str) -> int:
    return os.stat(path).st_size


def _ends(path: str) -> bytes:
    with open(path, "rb") as file:
        start = file.read(_END)
        file.seek(max(_file_size(path) - _END, 0))
        return hashlib.blake2b(start + file.read(_END)).digest()


def _contents(path: str) -> bytes:
    digest = hashlib.blake2b()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.digest()

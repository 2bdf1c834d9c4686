"""Decoded clips for training with PyTorch's `DataLoader`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from mplug2_fast.errors import VideoError
from mplug2_fast.ops.preprocess_frames import preprocess_frames
from mplug2_fast.video.indices import frame_indices, random_frame_indices
from mplug2_fast.video.limits import Guard, Limits


class ClipDataset(IterableDataset[dict[str, Any]]):
    """Clips of video files, each decoded by the worker that yields it.

    Yields dicts that the default collation turns into batches: `frames`, (3, num_frames, image_size, image_size),
    normalised, and `index`, the file's number in `paths`, which helps to find its texts.

    In training, the order of the files changes every epoch, and each interval of a video gives one random frame. The
    choice depends on the seed, the epoch and the file, not on the number of workers. Ranks and workers share the files;
    some files come twice so that each yields the same number of clips. Without training, every file comes once, in
    order, with the frames of `frame_indices`.

    Args:
        paths: the files.
        num_frames, image_size, dtype: as in `DecodePool`.
        training: see above.
        seed: for the order of files and the choice of frames.
        on_error: "raise"; or "replace" to warn about a file that cannot be decoded and use another random file of the
            same share, so that all ranks do the same number of steps.
        limits: on the cost of one file; None means the defaults of `Limits`.
        rank, world_size: of this process; None takes them from `torch.distributed` if that is initialised.

    Raises:
        ValueError: there are no files, or an option is out of its range.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        num_frames: int = 16,
        image_size: int = 224,
        dtype: torch.dtype = torch.float32,
        training: bool = True,
        seed: int = 0,
        on_error: Literal["raise", "replace"] = "raise",
        limits: Limits | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if not paths:
            raise ValueError("there are no files")
        for name, value in (("num_frames", num_frames), ("image_size", image_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if on_error not in ("raise", "replace"):
            raise ValueError(f"on_error must be 'raise' or 'replace', not {on_error!r}")
        together = dist.is_available() and dist.is_initialized()
        self._world_size = world_size if world_size is not None else dist.get_world_size() if together else 1
        self._rank = rank if rank is not None else dist.get_rank() if together else 0
        if not 0 <= self._rank < self._world_size:
            raise ValueError(f"rank must be from 0 to {self._world_size - 1}, not {self._rank}")
        self._paths = paths
        self._num_frames = num_frames
        self._image_size = image_size
        self._dtype = dtype
        self._training = training
        self._seed = seed
        self._on_error = on_error
        self._limits = limits
        # Shared with workers, including those that live longer than an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the number of the epoch, from 0. Call it before each epoch, with the same number on all ranks."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        share = self._share(self._rank * workers + number, self._world_size * workers)
        for index in share:
            yield self._clip(index, share)

    def _share(self, number: int, shares: int) -> list[int]:
        if not self._training:
            return list(range(number, len(self._paths), shares))
        order = np.random.default_rng((self._seed, int(self._epoch))).permutation(len(self._paths))
        return np.resize(order, -(-len(order) // shares) * shares)[number::shares].tolist()

    def _clip(self, index: int, share: list[int]) -> dict[str, Any]:
        try:
            return self._decode(index)
        except VideoError as error:
            if self._on_error == "raise":
                raise
            for other in np.random.default_rng((self._seed, int(self._epoch), index)).permutation(share).tolist():
                try:
                    clip = self._decode(other)
                except VideoError:
                    continue
                warnings.warn(f"{error}; using {os.fsdecode(self._paths[other])} instead", stacklevel=2)
                return clip
            raise VideoError(f"{error}; all other files of this share ({len(share)}) fail too") from error

    def _decode(self, index: int) -> dict[str, Any]:
        from mplug2_fast.video.decode import decode_frames

        def choose(total: int) -> list[int]:
            if not self._training:
                return frame_indices(total, self._num_frames)
            generator = np.random.default_rng((self._seed, int(self._epoch), index))
            return random_frame_indices(total, self._num_frames, generator)

        frames = decode_frames(
            self._paths[index], choose, threads=1, image_size=self._image_size, guard=Guard(self._limits)
        )
        pixels = torch.from_numpy(np.stack(frames))
        return {"frames": preprocess_frames(pixels, self._image_size, self._dtype), "index": index}

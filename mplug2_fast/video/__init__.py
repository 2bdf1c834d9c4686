"""Turns video files and still images into the model's input frames.

A process that only decodes does not need torch, so names are imported at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mplug2_fast.video.clip import Clip
    from mplug2_fast.video.clips import Windows
    from mplug2_fast.video.dali import DaliLoader
    from mplug2_fast.video.dataset import ClipDataset
    from mplug2_fast.video.frames import load_video, read_frames
    from mplug2_fast.video.indices import frame_indices, random_frame_indices
    from mplug2_fast.video.limits import Limits
    from mplug2_fast.video.pool import DecodePool
    from mplug2_fast.video.preparation import Preparation
    from mplug2_fast.video.reader import VideoReader

_EXPORTS = {
    "Clip": "clip",
    "ClipDataset": "dataset",
    "DaliLoader": "dali",
    "DecodePool": "pool",
    "Limits": "limits",
    "Preparation": "preparation",
    "VideoReader": "reader",
    "Windows": "clips",
    "frame_indices": "indices",
    "load_video": "frames",
    "random_frame_indices": "indices",
    "read_frames": "frames",
}

__all__ = [
    "Clip",
    "ClipDataset",
    "DaliLoader",
    "DecodePool",
    "Limits",
    "Preparation",
    "VideoReader",
    "Windows",
    "frame_indices",
    "load_video",
    "random_frame_indices",
    "read_frames",
]


if not TYPE_CHECKING:  # so that type checkers report names that are not imported above

    def __getattr__(name: str) -> Any:
        if name in _EXPORTS:
            return getattr(importlib.import_module(f"mplug2_fast.video.{_EXPORTS[name]}"), name)
        raise AttributeError(f"module 'mplug2_fast.video' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""A file to the model's input. Ours decodes only what it needs and resizes each frame at once. The official pipeline
decodes all frames, then resizes and normalises the selected ones."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.case import OURS, Agreement, Call, Case, relative_error
from bench.row import Key
from bench.video.files import BundledClips, Clips
from mplug2_fast import MPlug2Config
from mplug2_fast.ops.preprocess_frames import MEAN, STD
from mplug2_fast.video import frame_indices, load_video

FLOOR = 1e-6
"""Rounding, relative to the pixels' norm."""


def build(key: Key, preset: str, clips: Clips | BundledClips) -> Case:
    """One file per call, to the frames and pixels of the preset. Ours is `mplug2_fast.video.load_video`, "reference"
    the official pipeline."""
    vision = MPlug2Config.preset(preset).vision
    decode = {
        way: partial(load, num_frames=vision.num_frames, image_size=vision.image_size)
        for way, load in ((OURS, load_video), ("reference", reference))
    }

    def calls(way: str) -> list[Call]:
        return [Call(partial(decode[way], path)) for path in clips.paths]

    def agreement() -> Agreement:
        ours, exact = ([run(path) for path in clips.paths] for run in (decode[OURS], decode["reference"]))
        return Agreement(relative_error(ours, exact), FLOOR, {"reference": 0.0})

    return Case(key, {way: partial(calls, way) for way in decode}, 0, 0, agreement, "pyav")


def reference(path: str, num_frames: int, image_size: int) -> Tensor:
    """`(3, num_frames, image_size, image_size)`, float32. Decodes all frames to RGB, then resizes those of
    `frame_indices` to the nearest pixels and normalises them.

    One thread, because PyAV's default starts threads for each frame.
    """
    import av

    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(video=0)]
    taken = [torch.from_numpy(frames[index]) for index in frame_indices(len(frames), num_frames)]
    return torch.stack([_pixels(frame, image_size) for frame in taken], dim=1)


def _pixels(frame: Tensor, image_size: int) -> Tensor:
    """`(height, width, 3)`, uint8, to `(3, image_size, image_size)`."""
    rows, columns = (torch.arange(image_size) * length // image_size for length in frame.shape[:2])
    resized = frame[rows][:, columns].permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (resized - mean) / std

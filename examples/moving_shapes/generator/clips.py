"""Scenes as video files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from examples.moving_shapes.generator.render import CLIP_FRAMES, CLIP_SIZE, render, to_uint8
from examples.moving_shapes.generator.scenes import Scenes


def clip_frames(scene: Scenes) -> np.ndarray:
    """All frames of one scene, `(16, 128, 128, 3)` uint8."""
    return to_uint8(render(scene, np.arange(CLIP_FRAMES), np.arange(CLIP_SIZE), CLIP_SIZE))[0]


def write_clip(path: str | Path, frames: np.ndarray, fps: int = 8, crf: int = 22) -> None:
    """Encode uint8 frames `(frames, height, width, 3)` as h264. The extension of `path` chooses the container."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "preset": "veryfast"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())

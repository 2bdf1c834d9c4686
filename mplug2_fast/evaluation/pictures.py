"""Pictures of a report, as data URIs: plots and frames of videos."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mplug2_fast.errors import VideoError
from mplug2_fast.evaluation.metrics.base import load
from mplug2_fast.video import Limits, VideoReader

FRAMES = 4
"""Frames of an example."""
WIDTH = 160
"""Of a frame, in pixels."""
SECONDS = 20.0
"""Decode timeout for the frames of an example."""


def histogram(values: Sequence[float], name: str) -> str:
    """A histogram of the items' scores."""
    figure, axes = _figure()
    axes.hist(values, bins=20, range=(min(0.0, *values), max(100.0, *values)), color="#3b6ea5")
    axes.set_xlabel(name)
    axes.set_ylabel("items")
    return _svg(figure)


def found_at_rank(ranks: Sequence[float], direction: str = "") -> str:
    """The share of queries whose first right result is among the first K, over K. `direction` is for the label."""
    figure, axes = _figure()
    finite = sorted(rank for rank in ranks if rank != float("inf"))
    shares = [100 * (place + 1) / len(ranks) for place in range(len(finite))]
    axes.step(finite, shares, where="post", color="#3b6ea5")
    axes.set_xscale("log")
    axes.set_ylim(0, 100)
    axes.set_xlabel("K")
    axes.set_ylabel(f"{direction.replace('_', ' ')}R@K")
    return _svg(figure)


def frames_of(path: str, indices: Sequence[int]) -> list[str]:
    """Some of the frames that the model saw; none if the video can no longer be decoded."""
    chosen = [indices[place * len(indices) // FRAMES] for place in range(FRAMES)] if indices else []
    try:
        reader = VideoReader(path, threads=1, limits=Limits(seconds=SECONDS))
        return [_jpeg(frame) for frame in reader.frames(sorted(set(chosen)))]
    except (VideoError, OSError):
        return []


def _figure() -> tuple[Any, Any]:
    figure = load("matplotlib.figure").Figure(figsize=(4.2, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return _uri("image/svg+xml", file.getvalue())


def _jpeg(frame: Tensor) -> str:
    """A frame `(height, width, 3)`, uint8, as a small JPEG file."""
    step = max(1, frame.shape[1] // WIDTH)
    height, width = (size // step * step for size in frame.shape[:2])
    small = frame[:height, :width].float().unflatten(1, (-1, step)).unflatten(0, (-1, step)).mean(dim=(1, 3))
    file = io.BytesIO()
    load("matplotlib.image").imsave(file, small.round().byte().numpy(), format="jpeg")
    return _uri("image/jpeg", file.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"

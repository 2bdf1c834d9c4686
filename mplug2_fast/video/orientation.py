"""How the frames of a file are turned and mirrored to be upright."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass

import numpy as np
from av import VideoFrame
from av.filter import Graph
from av.sidedata.sidedata import Type

from mplug2_fast.video.limits import DamagedError


@dataclass(frozen=True)
class Orientation:
    """Frames are turned counterclockwise by quarter turns, then mirrored left to right."""

    quarter_turns: int = 0
    mirrored: bool = False

    def upright(self, pixels: np.ndarray) -> np.ndarray:
        pixels = np.rot90(pixels, self.quarter_turns)
        return pixels[:, ::-1] if self.mirrored else pixels


def orientation_of(frame: VideoFrame) -> Orientation:
    """The orientation that a frame asks for: that of its container, or of the picture's EXIF data.

    Raises:
        DamagedError: an angle that is not a multiple of 90 degrees.
    """
    matrix = _display_matrix(frame)
    return Orientation() if matrix is None else _orientation_of_matrix(struct.unpack("9i", matrix))


def _orientation_of_matrix(matrix: tuple[int, ...]) -> Orientation:
    """What ffmpeg's autorotation makes of a display matrix: by its angle, then by the signs of its diagonals."""
    a, b, _, c, d = matrix[:5]
    columns = math.hypot(a, c), math.hypot(b, d)
    angle = 0 if 0 in columns else round(math.degrees(math.atan2(b / columns[1], a / columns[0]))) % 360
    if angle in (0, 1, 359):
        return Orientation(2, True) if d < 0 else Orientation()
    if angle == 90:
        return Orientation(-1, c > 0)
    if angle == 270:
        return Orientation(1, c < 0)
    if angle == 180:
        return {
            (True, True): Orientation(2),
            (True, False): Orientation(0, True),
            (False, True): Orientation(2, True),
            (False, False): Orientation(),
        }[a < 0, d < 0]
    raise DamagedError(f"asks to be turned by {angle} degrees; only quarter turns are supported")


def _display_matrix(frame: VideoFrame) -> bytes | None:
    for _ in range(16):
        try:
            matrix = frame.side_data.get(Type.DISPLAYMATRIX)
        except ValueError as error:  # PyAV gives no side data where it does not know the kind of one
            unknown = re.match(r"\d+", str(error))
            if unknown is None:
                raise
            frame = _without_side_data(frame, unknown[0])
        else:
            return None if matrix is None else bytes(matrix)
    return None


def _without_side_data(frame: VideoFrame, kind: str) -> VideoFrame:
    graph = Graph()
    source = graph.add("buffer", f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1")
    delete, sink = graph.add("sidedata", f"mode=delete:type={kind}"), graph.add("buffersink")
    source.link_to(delete)
    delete.link_to(sink)
    graph.configure()
    source.push(frame)
    return sink.pull()

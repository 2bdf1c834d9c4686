"""How the frames of a file are rotated and mirrored to be upright."""

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
    """Frames are rotated counterclockwise by quarter turns, then mirrored left to right."""

    quarter_turns: int = 0
    mirrored: bool = False

    def upright(self, pixels: np.ndarray) -> np.ndarray:
        pixels = np.rot90(pixels, self.quarter_turns)
        return pixels[:, ::-1] if self.mirrored else pixels


class OrientationReader:
    """Reads the orientation of frames from their container, or from a picture's EXIF data.

    When Python reads the side data of a frame, the frame is not freed at once, and it may be large. So libav finds the
    frames with a display matrix, and Python reads the matrix of a small copy.
    """

    def __init__(self) -> None:
        self._of: tuple[int, int, str] | None = None

    def __call__(self, frame: VideoFrame) -> Orientation:
        """The orientation of a frame.

        Raises:
            DamagedError: the angle is not a multiple of 90 degrees.
        """
        if self._of != (frame.width, frame.height, frame.format.name):
            self._of = frame.width, frame.height, frame.format.name
            chosen = ("sidedata", "mode=select:type=DISPLAYMATRIX")
            self._graph = _graph(frame, chosen, ("scale", "16:16"))
        self._graph.push(frame)
        try:
            matrix = _display_matrix(self._graph.pull())
        except (BlockingIOError, EOFError):
            return Orientation()
        return Orientation() if matrix is None else _orientation_of_matrix(struct.unpack("9i", matrix))


def _orientation_of_matrix(matrix: tuple[int, ...]) -> Orientation:
    """The orientation that ffmpeg's autorotation derives from a matrix: by its angle, then by its diagonal's signs."""
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
    raise DamagedError(f"requires a rotation by {angle} degrees; only quarter turns are supported")


def _display_matrix(frame: VideoFrame) -> bytes | None:
    for _ in range(16):
        try:
            matrix = frame.side_data.get(Type.DISPLAYMATRIX)
        except ValueError as error:  # PyAV fails if one item of side data has an unknown kind
            unknown = re.match(r"\d+", str(error))
            if unknown is None:
                raise
            frame = _without_side_data(frame, unknown[0])
        else:
            return None if matrix is None else bytes(matrix)
    return None


def _without_side_data(frame: VideoFrame, kind: str) -> VideoFrame:
    graph = _graph(frame, ("sidedata", f"mode=delete:type={kind}"))
    graph.push(frame)
    return graph.pull()


def _graph(frame: VideoFrame, *filters: tuple[str, str]) -> Graph:
    graph = Graph()
    size = f"{frame.width}x{frame.height}"
    chain = [("buffer", f"video_size={size}:pix_fmt={frame.format.name}:time_base=1/1"), *filters, ("buffersink", "")]
    graph.link_nodes(*[graph.add(name, arguments or None) for name, arguments in chain]).configure()
    return graph

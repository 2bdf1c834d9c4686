"""Frames decoded by torchcodec, where it can be trusted.

torchcodec hands out pictures that the decoder has painted over for want of data, without a word, and puts another frame
in the place of a missing one. So it gets only codecs whose decoders fail on damage, and the time of each frame is
compared with that of its packet.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mplug2_fast.errors import VideoError
from mplug2_fast.video.orientation import Orientation
from mplug2_fast.video.pixels import squash
from mplug2_fast.video.seek import Scan

# Damaged at random, files of these raised wherever PyAV did. Those of h264, mpeg4 and mjpeg gave pictures nine times
# out of ten, those of av1 now and then.
_SOUND = ("hevc", "vp8", "vp9")
_BATCH = 4


def reason_not_served(scan: Scan, orientation: Orientation) -> str | None:
    if scan.codec not in _SOUND:
        return f"of {scan.codec} it decodes damaged files without an error"
    if not scan.one_frame_a_packet:
        return "its frames cannot be told by their times"
    if scan.crop is not None:
        return "it does not crop frames as the container asks for"
    if orientation.mirrored:
        return "it does not mirror frames"
    return None


def stream_frames(
    name: str, scan: Scan, indices: list[int], *, threads: int, image_size: int | None
) -> Iterator[np.ndarray]:
    """The frames with these indices: see `mplug2_fast.video.backends.stream_frames`."""
    from torchcodec.decoders import VideoDecoder

    times = sorted(packet.pts for packet in scan.packets)
    if indices and max(indices) >= len(times):
        raise VideoError(f"{name}: has only {len(times):,} frames: there is no frame {max(indices):,}")
    try:
        decoder = VideoDecoder(name, dimension_order="NHWC", num_ffmpeg_threads=threads)
        for first in range(0, len(indices), _BATCH):
            asked = indices[first : first + _BATCH]
            batch = decoder.get_frames_at(asked)
            for index, pixels, seconds in zip(asked, batch.data.numpy(), batch.pts_seconds.tolist(), strict=True):
                if round(seconds / scan.seconds_a_tick) != times[index]:
                    raise VideoError(f"{name}: is corrupt: torchcodec puts another frame in the place of frame {index}")
                yield pixels if image_size is None else squash(pixels, image_size)
    except (RuntimeError, ValueError, IndexError) as error:
        detail = str(error).strip().splitlines()[0][:200]
        raise VideoError(f"{name}: is corrupt: torchcodec cannot decode it ({detail})") from error

"""Decodes frames with torchcodec, where it is reliable.

torchcodec silently returns pictures that the decoder has repaired without enough data, and replaces a missing frame by
another one. So it is used only for codecs whose decoders fail on damage, and the time of each frame is compared with
that of its packet.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mplug2_fast.errors import VideoError
from mplug2_fast.video.orientation import Orientation
from mplug2_fast.video.pixels import squash
from mplug2_fast.video.preparation import Resampling
from mplug2_fast.video.seek import Scan

# Tested with random damage. For these codecs, torchcodec failed whenever PyAV did. For h264, mpeg4 and mjpeg it
# returned pictures in nine of ten cases, for av1 sometimes.
_RELIABLE = ("hevc", "vp8", "vp9")
_BATCH = 4


def reason_not_served(scan: Scan, orientation: Orientation) -> str | None:
    if scan.codec not in _RELIABLE:
        return f"it decodes damaged {scan.codec} files without an error"
    if not scan.one_frame_a_packet:
        return "the times of its packets do not identify its frames"
    if scan.crop is not None:
        return "it does not crop frames as the container requires"
    if orientation.mirrored:
        return "it does not mirror frames"
    return None


def stream_frames(
    name: str,
    scan: Scan,
    indices: list[int],
    *,
    threads: int,
    image_size: int | None,
    resampling: Resampling = "nearest",
) -> Iterator[np.ndarray]:
    """Yields the frames with these indices: see `mplug2_fast.video.backends.stream_frames`."""
    from torchcodec.decoders import VideoDecoder

    times = sorted(packet.pts for packet in scan.packets)
    if indices and max(indices) >= len(times):
        raise VideoError(f"{name}: has only {len(times):,} frames: there is no frame {max(indices):,}")
    try:
        decoder = VideoDecoder(name, dimension_order="NHWC", num_ffmpeg_threads=threads)
        for first in range(0, len(indices), _BATCH):
            chosen = indices[first : first + _BATCH]
            batch = decoder.get_frames_at(chosen)
            for index, pixels, seconds in zip(chosen, batch.data.numpy(), batch.pts_seconds.tolist(), strict=True):
                if round(seconds / scan.seconds_a_tick) != times[index]:
                    raise VideoError(f"{name}: is corrupt: torchcodec replaces frame {index} by another")
                scan.size = pixels.shape[1], pixels.shape[0]
                yield pixels if image_size is None else squash(pixels, image_size, resampling)
    except (RuntimeError, ValueError, IndexError) as error:
        detail = str(error).strip().splitlines()[0][:200]
        raise VideoError(f"{name}: is corrupt: torchcodec cannot decode it ({detail})") from error

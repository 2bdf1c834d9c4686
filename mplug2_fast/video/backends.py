"""The libraries that decode: which are installed, and which of them may decode a file.

PyAV is always installed, decodes everything and reports damage; its frames are the reference for the other libraries.
Those are used on request only, and refuse files that they are known to decode wrongly without an error.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator

import numpy as np

from mplug2_fast.errors import BackendError, VideoError
from mplug2_fast.video.limits import Guard
from mplug2_fast.video.preparation import Resampling
from mplug2_fast.video.seek import Scan

_INSTALL = {
    "pyav": "pip install av",
    "torchcodec": "pip install torchcodec (0.11 to 0.13 for torch without CUDA), which needs FFmpeg's libraries",
    "dali": "pip install mplug2-fast[dali-cuda13], or [dali-cuda12]",
}
_MODULES = {"pyav": "av", "torchcodec": "torchcodec.decoders", "dali": "nvidia.dali"}
READER_BACKENDS = ("pyav", "torchcodec")
"""The backends that return frames on the host. For DALI, which returns clips, see `mplug2_fast.video.DaliLoader`."""


def reason_not_available(backend: str) -> str | None:
    """Why a library cannot be used, and the remedy; None if it can be used."""
    module = _MODULES[backend]
    try:
        if importlib.util.find_spec(module) is None:
            return f"not installed: {_INSTALL[backend]}"
    except ModuleNotFoundError:  # the package of the module is missing
        return f"not installed: {_INSTALL[backend]}"
    try:
        importlib.import_module(module)
    except Exception as error:  # a library that does not fit may raise anything
        return f"cannot be imported ({' '.join(str(error).split())[:300]}): {_INSTALL[backend]}"
    return None


def versions() -> dict[str, str]:
    """The version of each library, or why it is not available."""
    return {backend: reason_not_available(backend) or _version(backend) for backend in _MODULES}


def _version(backend: str) -> str:
    module = importlib.import_module(_MODULES[backend].removesuffix(".decoders"))
    return str(module.__version__)


def check_backend(backend: str | None) -> str:
    """Checks the name of a backend for frames on the host; None means PyAV.

    Raises:
        BackendError: the name is unknown, or the backend is not available.
    """
    backend = "pyav" if backend is None else backend
    if backend not in READER_BACKENDS:
        raise BackendError(f"unknown video backend {backend!r}: choose one of {', '.join(READER_BACKENDS)}")
    if reason := reason_not_available(backend):
        raise BackendError(f"the video backend {backend} is {reason}")
    return backend


def stream_frames(
    backend: str,
    name: str,
    scan: Scan,
    indices: list[int],
    *,
    threads: int,
    image_size: int | None,
    resampling: Resampling = "nearest",
    guard: Guard,
) -> Iterator[np.ndarray]:
    """Yields the frames with these ascending indices as they are decoded, as arrays like those of `decode_frames`.

    Raises:
        VideoError: the file cannot be decoded, or not by this backend. Good frames may have come before.
    """
    sizes = {"image_size": image_size, "resampling": resampling}
    if backend == "pyav":
        from mplug2_fast.video.decode import stream_scanned

        return stream_scanned(name, scan, indices, threads=threads, guard=guard, **sizes)
    from mplug2_fast.video import torchcodec
    from mplug2_fast.video.decode import orientation

    if reason := torchcodec.reason_not_served(scan, orientation(name, scan, guard)):
        raise VideoError(f"{name}: torchcodec may not decode it: {reason}; use the backend pyav")
    return torchcodec.stream_frames(name, scan, indices, threads=threads, **sizes)

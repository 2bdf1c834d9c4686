"""Reads still images as upright RGB pixels.

Pillow decodes the formats in `FORMATS`. PyAV decodes the others, such as HEIC or OpenEXR; `LoadedImage.decoder` shows
which of them decoded a file. A damaged file that Pillow recognises is an error; PyAV does not try it.

How colours become RGB with 8 bits:

- Grey levels and palettes: the colour itself.
- Transparency is dropped, as in the official code. Transparent pixels show the colour that the file stores for them.
- CMYK: Pillow's conversion without colour profiles. JPEG files of Adobe's programs store inverted values, which Pillow
  inverts again.
- 16 bits per channel: the upper 8 bits. Whole numbers of 32 bits count as 16 bits, limited to 0..65535.
- Floating-point numbers: from 0..1 if none is greater than 1, otherwise limited to 0..255.
- Colour profiles are not applied, as in the official code.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mplug2_fast.errors import VideoError, printable
from mplug2_fast.video.files import open_media
from mplug2_fast.video.limits import DamagedError, Guard, LimitError, Limits, too_much_memory

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "SGI", "TIFF", "WEBP")
"""The formats that Pillow may try. The first bytes of a file identify each of them."""
_ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")
_BYTES_PER_PIXEL = 8
"""Memory per pixel: Pillow's 4 bytes, and RGB with a copy."""
_ORIENTATION = 0x0112


class LoadedImage(NamedTuple):
    """An image: pixels (height, width, 3), uint8, RGB, upright; and "pillow" or "pyav"."""

    pixels: np.ndarray
    decoder: str


def load_image(source: str | os.PathLike[str] | bytes, *, limits: Limits | None = None) -> LoadedImage:
    """Reads an image file. Of an animation, this is the first frame.

    Args:
        source: a path, or the bytes of a file.
        limits: on pixels and memory, and for PyAV on time; None means the defaults of `Limits`.

    Raises:
        VideoError: the file is not an image, is damaged, or exceeds a limit; one line, "<path>: <reason>".
    """
    guard = Guard(limits)
    pixels = read_still(source, guard)
    if pixels is not None:
        return LoadedImage(pixels, "pillow")
    from mplug2_fast.video.reader import VideoReader

    with VideoReader(source, threads=1, limits=guard.limits) as reader:
        return LoadedImage(reader.frames([0])[0].numpy(), "pyav")


def read_still(source: str | os.PathLike[str] | bytes, guard: Guard, *, animations: bool = True) -> np.ndarray | None:
    """The pixels of an image that Pillow decodes; None for a file in another format, such as a video.

    Args:
        source: a path, or the bytes of a file. guard: limits on its cost.
        animations: False returns None for an animation.

    Raises:
        VideoError: as in `load_image`.
    """
    if isinstance(source, bytes):
        name = f"{len(source):,} bytes in memory"
    else:
        source = name = os.fsdecode(source)
    try:
        if isinstance(source, bytes):
            if not source:
                raise DamagedError("is empty")
            return _decoded(io.BytesIO(source), guard, animations)
        with open_media(source) as (file, _):
            return _decoded(file, guard, animations)
    except MemoryError:
        reason = "needs more memory than is available"
        if guard.limits.memory is not None:
            reason = str(too_much_memory(guard.limits.memory))
    except (DamagedError, LimitError) as error:
        reason = str(error)
    raise VideoError(f"{name}: {reason}".replace("\n", " "))


def _decoded(file: io.BufferedIOBase, guard: Guard, animations: bool) -> np.ndarray | None:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=FORMATS) as image:
            if not animations and image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1:
                return None
            _check_size(image, guard)
            image.load()
            return _rgb(_upright(image))
    except UnidentifiedImageError:
        return None
    except Image.DecompressionBombError as error:
        detail = str(error).partition(",")[0]
        raise LimitError(f"has too many pixels for Pillow ({detail}): make the image smaller") from None
    except (MemoryError, DamagedError, LimitError):
        raise
    except Exception as error:  # Pillow's decoders raise errors of many kinds for damaged files
        detail = printable(" ".join(str(error).split()) or type(error).__name__, 200)
        raise DamagedError(f"is corrupt: Pillow cannot decode it ({detail})") from None


def _check_size(image: Image.Image, guard: Guard) -> None:
    """Compares the size in the header with the limits, before anything is decoded."""
    width, height = image.size
    pixels, memory = guard.limits.pixels, guard.limits.memory
    if pixels is not None and width * height > pixels:
        raise LimitError(f"has {width:,}x{height:,} pixels, more than {pixels:,} in total; raise Limits.pixels")
    if memory is not None and width * height * _BYTES_PER_PIXEL > memory:
        raise too_much_memory(memory)


def _upright(image: Image.Image) -> Image.Image:
    """Applies the orientation of the EXIF data. Damaged EXIF data count as none."""
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # of many kinds; the pixels are intact
        orientation = None
    turn = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> np.ndarray:
    """The pixels as RGB with 8 bits: see above."""
    if image.mode.startswith("I") or image.mode == "F":
        return np.repeat(_eight_bits(np.asarray(image))[..., None], 3, axis=2)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("P", "PA", "RGBa"):  # by way of RGBA, because a palette may have transparent colours
        image = image.convert("RGBA")
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.array(image)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=0.0, posinf=255.0, neginf=0.0)
        values = values * 255 if values.max() <= 1 else values
        return np.rint(values.clip(0, 255)).astype(np.uint8)
    return (values.clip(0, 65535).astype(np.uint16) >> 8).astype(np.uint8)

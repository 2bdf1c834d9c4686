"""Draws boxes on pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mplug2_fast.errors import ConfigError, MPlug2Error, printable

if TYPE_CHECKING:
    from PIL import Image

INNER, OUTER = (230, 30, 30), (255, 255, 255)
"""Colours of the line and of its edges, which show on any background."""

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")


def with_box(pixels: np.ndarray, box: tuple[float, float, float, float]) -> Image.Image:
    """The picture (height, width, 3), uint8, with a box (left, top, right, bottom) in pixels."""
    from PIL import Image, ImageDraw

    image = Image.fromarray(np.ascontiguousarray(pixels))
    draw, width = ImageDraw.Draw(image), max(1, round(min(image.size) / 200))
    left, top, right, bottom = map(round, box)
    # Rectangles include their last column and row.
    right, bottom = max(right - 1, left), max(bottom - 1, top)
    for grown, colour in ((0, OUTER), (width, INNER), (2 * width, OUTER)):
        x1, y1, x2, y2 = left - width + grown, top - width + grown, right + width - grown, bottom + width - grown
        if x1 <= x2 and y1 <= y2:
            draw.rectangle((x1, y1, x2, y2), outline=colour, width=width)
    return image


def require_writable(path: Path) -> None:
    """Raises `ConfigError` for a file name whose extension is no format that pictures are written in."""
    from PIL import Image

    Image.init()
    known = Image.registered_extensions()
    if known.get(path.suffix.lower()) not in Image.SAVE:
        raise ConfigError(
            f"{printable(str(path))}: pictures cannot be written in this format: choose a name that ends in .png"
        )


def save(image: Image.Image, path: Path) -> None:
    """Writes a picture. Raises `MPlug2Error`."""
    try:
        if path.suffix.lower() in _JPEG:
            image.save(path, quality=95)
        else:
            image.save(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MPlug2Error(f"{printable(str(path))}: the picture cannot be written: {reason}") from error

"""Boxes of results, as users read them."""

from __future__ import annotations

from mplug2_fast.video.preparation import Box


def box_fields(box: Box | None, size: tuple[int, int] | None) -> dict[str, list[float] | None]:
    """The fields of a box (left, top, right, bottom) in pixels, for JSON.

    `box` is in pixels, `box_relative` is (center x, center y, width, height) in [0, 1] of the picture, as in data
    sets. Both are None without a box.

    Args:
        size: width and height of the picture.
    """
    if box is None or size is None:
        return {"box": None, "box_relative": None}
    left, top, right, bottom = box
    width, height = size
    relative = (left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height
    return {"box": [round(value, 2) for value in box], "box_relative": [round(value, 6) for value in relative]}

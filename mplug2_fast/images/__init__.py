"""Still images: files to pixels, the input of mPLUG, and the random changes of training.

Names are imported at their first use, because Pillow and torch take time to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mplug2_fast.images.augment import GroundingAugment, ImageAugment
    from mplug2_fast.images.load import LoadedImage, load_image
    from mplug2_fast.images.preparation import MPLUG, MPlugGrounding

_EXPORTS = {
    "MPLUG": "preparation",
    "GroundingAugment": "augment",
    "ImageAugment": "augment",
    "LoadedImage": "load",
    "MPlugGrounding": "preparation",
    "load_image": "load",
}

__all__ = ["MPLUG", "GroundingAugment", "ImageAugment", "LoadedImage", "MPlugGrounding", "load_image"]


if not TYPE_CHECKING:  # so that type checkers report names that are not imported above

    def __getattr__(name: str) -> Any:
        if name in _EXPORTS:
            return getattr(importlib.import_module(f"mplug2_fast.images.{_EXPORTS[name]}"), name)
        raise AttributeError(f"module 'mplug2_fast.images' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

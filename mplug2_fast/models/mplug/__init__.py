"""A fast mPLUG (arXiv 2205.12005). It computes the function of `mplug2_fast.reference` by another algorithm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mplug2_fast.models.mplug.model import MPlug

__all__ = ["MPlug"]


def __getattr__(name: str) -> Any:  # imported when first used: reading a configuration does not import the operators
    if name == "MPlug":
        from mplug2_fast.models.mplug.model import MPlug

        return MPlug
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

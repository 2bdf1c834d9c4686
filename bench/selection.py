"""What of a level is to be measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Selection:
    """Attributes:
    preset: "tiny", "base" or "large".
    directions: of `bench.row.DIRECTIONS`; a work that has no such direction is passed over.
    only: names of works; empty for all.
    sizes: of the operators alone; empty for the preset's.
    """

    preset: str
    dtypes: tuple[str, ...] = ("float32",)
    device: str = "cpu"
    directions: tuple[str, ...] = ("forward",)
    only: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    quick: bool = False

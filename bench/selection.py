"""What the user asked to have measured."""

from __future__ import annotations

from dataclasses import dataclass

from bench.row import Key

SIZES = ("quick", "base", "large", "awkward")


@dataclass(frozen=True)
class Selection:
    """The works of the levels that are measured in one process each.

    Attributes:
        preset: "tiny", "base" or "large": of modules and files.
        sizes: of operators, of `SIZES`.
        only: names; empty for all.
    """

    preset: str
    dtypes: tuple[str, ...]
    device: str = "cpu"
    directions: tuple[str, ...] = ("forward",)
    sizes: tuple[str, ...] = ("large",)
    only: tuple[str, ...] = ()
    quick: bool = False

    def wants(self, key: Key) -> bool:
        return not self.only or key.name in self.only

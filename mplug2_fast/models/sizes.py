"""What the families share when they read sizes from the shapes of a state dict."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mplug2_fast.errors import CheckpointError
from mplug2_fast.models.names import LAYER_NUMBER, Shape

HEAD_DIM = 64
"""Channels of an attention head in all official sizes."""


class Stated:
    """What a checkpoint's own configuration states.

    Attributes:
        assumed: dotted field -> official default, for fields that it does not state.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.assumed: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def get(self, part: str, name: str, default: Any, source: str | None = None) -> Any:
        """The value of a field, which the file calls `source`, or the default.

        Raises `CheckpointError` for a value of a wrong type.
        """
        value = self._values.get(source or name)
        if value is None:
            self.assumed[f"{part}.{name}"] = default
            return default
        if type(value) is not (str if name == "prompt" else int):
            kind = type(value).__name__
            raise CheckpointError(
                f"its own configuration states {source or name} as {kind}: correct it, or pass config="
            )
        return value

    def generation(self, num_beams: int, prompt: str) -> dict[str, Any]:
        """The defaults of generation."""
        found = {
            "num_beams": self.get("generation", "num_beams", num_beams, "beam_size"),
            "prompt": self.get("generation", "prompt", prompt),
        }
        return found | {name: self._values[name] for name in ("min_length", "max_length") if name in self}


def require_anchors(
    anchors: Mapping[str, int], shapes: Mapping[str, Shape], title: str, absent: Iterable[str] = ()
) -> None:
    """Raises `CheckpointError` unless all entries are there that determine the sizes, with their number of axes.

    Args:
        anchors: name -> number of axes. title: of the family. absent: further names that are known to be missing.
    """
    missing = [*(key for key in anchors if key not in shapes), *absent]
    if missing:
        listing = "".join(f"\n  {key}" for key in missing)
        raise CheckpointError(
            f"keys that determine the model's sizes are missing:{listing}\n"
            f"  remedy: use a whole checkpoint of {title}, with its official key names"
        )
    flat = [
        f"{key} {list(shapes[key])}" for key, rank in anchors.items() if len(shapes[key]) != rank or 0 in shapes[key]
    ]
    if flat:
        raise CheckpointError(f"shapes that no {title} model has: {', '.join(flat)}")


def patches_along_a_side(positions: str, shapes: Mapping[str, Shape]) -> int:
    """The side of the square of patches that the position embedding `positions` is for."""
    tokens = shapes[positions][0]
    side = math.isqrt(tokens - 1)
    if side * side != tokens - 1 or not side:
        raise CheckpointError(
            f"{positions} has {tokens} rows, which is not a class token and a square of patches: "
            "the checkpoint was trained on another kind of input"
        )
    return side


def first_connected(shapes: Iterable[str], stack: str, first_layer: int) -> int | None:
    """Which of the layers of a fusion stack that run is the first without cross-attention, where those were left
    out."""
    crossing = layers((key for key in shapes if ".crossattention." in key), stack)
    stored = sorted(layers(shapes, stack))
    return next((n - first_layer for n in stored if n > first_layer and n not in crossing), None)


def layers(keys: Iterable[str], stack: str) -> set[int]:
    """The numbers of the layers of a stack."""
    found = (re.match(rf"{re.escape(stack)}\.{LAYER_NUMBER}\.", key) for key in keys)
    return {int(match[1]) for match in found if match}


def count(numbers: set[int]) -> int:
    """How many layers a stack has whose layers have these numbers."""
    return max(numbers) + 1 if numbers else 0

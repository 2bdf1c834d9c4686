"""Pictures of several still shapes, and where they are, seen from each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from examples.moving_shapes.generator import COLORS, SHAPES, Scenes, sample_scenes

CLEAR = 1.4
"""How much longer the distance along a direction must be than the one across."""
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
"""Axis and sign."""
_REACH = 1.3  # the farthest point of any shape from its center, in radii


def look(color: int, shape: int) -> str:
    """Such as "red circle"."""
    return f"{list(COLORS)[color]} {SHAPES[shape]}"


def direction(center: np.ndarray, i: int, other: int) -> str:
    """Where shape i is, seen from another one. Empty if this is not clear.

    Args:
        center: of all shapes `(n, 2)`.
    """
    difference = center[i] - center[other]
    axis = int(np.argmax(np.abs(difference)))
    if abs(difference[axis]) < CLEAR * abs(difference[1 - axis]):
        return ""
    return next(name for name, place in DIRECTIONS.items() if place == (axis, np.sign(difference[axis])))


def scattered(
    rng: np.random.Generator,
    n: int,
    radius: tuple[float, float],
    wanted: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Radii `(n,)` and centers `(n, 2)` of shapes that do not touch.

    Args:
        radius: the smallest and the largest.
        wanted: from centers `(draws, n, 2)` to those that may be taken `(draws,)`.
    """
    draws = 1024 if wanted else 8
    while True:
        radii = rng.uniform(*radius, (draws, n)).astype(np.float32)
        center = (0.5 + (0.5 - _REACH * radii[..., None]) * rng.uniform(-1, 1, (draws, n, 2))).astype(np.float32)
        if wanted:
            kept = wanted(center)
            radii, center = radii[kept], center[kept]
        distance = np.linalg.norm(center[:, :, None] - center[:, None], axis=-1)
        fit = ((distance >= _REACH * (radii[:, :, None] + radii[:, None])) | np.eye(n, dtype=bool)).all((1, 2))
        if fit.any():
            return radii[fit][0], center[fit][0]


def still(rng: np.random.Generator, color: Any, shape: Any, center: np.ndarray, radius: np.ndarray) -> Scenes:
    """Shapes of these looks and places that do not move."""
    n, palette = len(center), np.array(list(COLORS.values()))
    return replace(
        sample_scenes(rng, n),
        color=color,
        shape=shape,
        rgb=np.clip(palette[color] + rng.uniform(-0.05, 0.05, (n, 3)), 0, 1).astype(np.float32),
        center=center,
        radius=radius,
        velocity=np.zeros((n, 2), np.float32),
        growth=np.zeros(n, np.float32),
    )

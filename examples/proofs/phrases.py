"""Phrases that name one of several shapes: "the square left of the blue circle"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from examples.moving_shapes.generator import COLORS, SHAPES, Scenes
from examples.proofs.pictures import CLEAR, DIRECTIONS, direction, look, scattered, still

RADIUS = (0.09, 0.125)
MISLEADING = 0.6
"""The share of pictures of three or more shapes in which another shape of that noun is farther in the direction."""
FARTHER = 0.02
KINDS = ("a color", "a shape and a direction", "a color and a direction", "a direction")


class Phrase(NamedTuple):
    """A phrase, how it names it, the shape that it names, and whether that is the farthest of its noun.

    The phrase ends with a description of the shape `last`: that from which the direction is seen, or the named one.
    """

    text: str
    kind: str
    named: int
    farthest: bool
    last: int


def phrases(color: np.ndarray, shape: np.ndarray, center: np.ndarray) -> Iterator[Phrase]:
    """All phrases that name exactly one shape, by its color or by its direction from a shape of unique look."""
    looks = [look(*each) for each in zip(color, shape, strict=True)]
    for i in range(len(looks)):
        same_color, same_shape = np.flatnonzero(color == color[i]), np.flatnonzero(shape == shape[i])
        named = f"the {list(COLORS)[color[i]]} shape"
        if len(same_color) == 1:
            yield Phrase(named, KINDS[0], i, True, i)
        nouns = (f"the {SHAPES[shape[i]]}", same_shape), (named, same_color), ("the shape", np.arange(len(looks)))
        for kind, (noun, alike) in zip(KINDS[1:], nouns, strict=True):
            for other in range(len(looks)):
                if other == i or len(alike) < 2 or looks.count(looks[other]) > 1:
                    continue
                where = direction(center, i, other)
                found = [direction(center, j, other) for j in alike if j != other]
                if all(found) and found.count(where) == 1:
                    axis, sign = DIRECTIONS[where]
                    farthest = alike[np.argmax(sign * center[alike, axis])] == i
                    yield Phrase(f"{noun} {where} the {looks[other]}", kind, i, bool(farthest), other)


def misleading(center: np.ndarray) -> np.ndarray:
    """Whether the third shape is farther than the first in the first one's direction from the second, but in another
    direction from it: `(draws,)` of centers `(draws, n, 2)`."""
    first, third = center[:, 0] - center[:, 1], center[:, 2] - center[:, 1]
    axis = np.abs(first).argmax(1)[:, None]
    along, across, along_3, across_3 = (
        np.take_along_axis(vector, x, 1)[:, 0] for vector in (first, third) for x in (axis, 1 - axis)
    )
    clear = (np.abs(along) > CLEAR * np.abs(across)) & (np.abs(across_3) > CLEAR * np.abs(along_3))
    return clear & (along_3 * np.sign(along) > np.abs(along) + FARTHER)


def drawn(rng: np.random.Generator) -> tuple[Scenes, Phrase, list[Phrase]]:
    """Shapes, a phrase about them, and all phrases about them. All kinds of the first are equally likely."""
    kind, n = KINDS[rng.integers(len(KINDS))], int(rng.integers(2, 5))
    farthest = kind == KINDS[0] or n < 3 or rng.random() >= MISLEADING
    while True:
        radius, center = scattered(rng, n, RADIUS, None if farthest else misleading)
        color, shape = (rng.choice(len(all_), 3, replace=False)[rng.integers(3, size=n)] for all_ in (COLORS, SHAPES))
        if not farthest and kind != KINDS[3]:
            same = shape if kind == KINDS[1] else color
            same[2] = same[0]
        every = list(phrases(color, shape, center))
        found = [each for each in every if each.kind == kind and each.farthest == farthest]
        if found:
            return still(rng, color, shape, center, radius), found[rng.integers(len(found))], every

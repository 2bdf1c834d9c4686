"""Random scenes. Each property is one array, so that a batch is drawn and rendered at once.

Only the order of the frames shows the direction of a motion. A scene's motion is `amplitude * u`, where the time u runs
from -1 to 1. The frames that the model sees are symmetric around 0. Opposite actions differ only in the sign of the
motion, so they show the same frames in opposite orders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COLORS = {
    "red": (0.88, 0.10, 0.10),
    "orange": (0.98, 0.52, 0.05),
    "yellow": (0.97, 0.92, 0.12),
    "green": (0.10, 0.72, 0.16),
    "cyan": (0.10, 0.85, 0.92),
    "blue": (0.10, 0.18, 0.92),
    "purple": (0.62, 0.12, 0.80),
    "white": (0.98, 0.98, 0.98),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
ACTIONS = ("moves left", "moves right", "moves up", "moves down", "grows", "shrinks", "stays still")
OPPOSITE = np.array([1, 0, 3, 2, 5, 4, 6])
"""For each action, the action that it shows when played backwards."""

_VELOCITY = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0), (0, 0), (0, 0)], np.float32)
_GROWTH = np.array([0, 0, 0, 0, 1, -1, 0], np.float32)
_REACH = 1.3  # the farthest point of any shape from its centre, in radii
_WAVES = 5
_TRAINING, _HELD_OUT = 0, 1


@dataclass(frozen=True)
class Scenes:
    """n scenes. Lengths are fractions of the image side, x to the right and y downwards."""

    color: np.ndarray
    """(n,) index into COLORS"""
    shape: np.ndarray
    """(n,) index into SHAPES"""
    action: np.ndarray
    """(n,) index into ACTIONS"""
    rgb: np.ndarray
    """(n, 3) the colour with a random variation, 0 to 1"""
    center: np.ndarray
    """(n, 2) at u = 0"""
    radius: np.ndarray
    """(n,) at u = 0"""
    velocity: np.ndarray
    """(n, 2) displacement from u = 0 to u = 1"""
    growth: np.ndarray
    """(n,) log of the ratio of the radius at u = 1 to that at u = 0"""
    background_rgb: np.ndarray
    """(n, 2, 3) the two colours that the background mixes"""
    ramp: np.ndarray
    """(n, 2) linear part of the mixture"""
    wave_vectors: np.ndarray
    """(n, waves, 2) periods per image side"""
    wave_phases: np.ndarray
    """(n, waves)"""
    wave_weights: np.ndarray
    """(n, waves), 0 for waves that are absent"""

    def __len__(self) -> int:
        return len(self.color)

    def __getitem__(self, index: int | slice | np.ndarray) -> Scenes:
        """A selection of scenes. A single index gives a `Scenes` of length 1."""
        if isinstance(index, int | np.integer):
            index = slice(index, index + 1)
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)})

    @classmethod
    def joined(cls, parts: Sequence[Scenes]) -> Scenes:
        """The scenes of all parts, one after another."""
        names = [f.name for f in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def backwards(self) -> Scenes:
        """The same scenes with reversed motion."""
        return dataclasses.replace(self, action=OPPOSITE[self.action], velocity=-self.velocity, growth=-self.growth)


def sample_scenes(rng: np.random.Generator, n: int) -> Scenes:
    """Draw n scenes. All colours, shapes and actions are equally likely."""
    color, shape, action = (rng.integers(len(names), size=n) for names in (COLORS, SHAPES, ACTIONS))

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)

    radius = uniform(0.15, 0.21)
    velocity = uniform(0.16, 0.25, 1) * _VELOCITY[action]
    growth = uniform(0.35, 0.6) * _GROWTH[action]
    reach = np.abs(velocity) + (_REACH * radius * np.exp(np.abs(growth)))[:, None]
    room = np.maximum(0.5 - reach, 0.0)
    palette = np.array(list(COLORS.values()), np.float32)
    return Scenes(
        color=color,
        shape=shape,
        action=action,
        rgb=np.clip(palette[color] + uniform(-0.05, 0.05, 3), 0, 1),
        center=0.5 + room * uniform(-1, 1, 2),
        radius=radius,
        velocity=velocity,
        growth=growth,
        **_sample_backgrounds(rng, n),
    )


def _sample_backgrounds(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """Gradients, stripes and textures in muted colours, darker than white and greyer than the shapes."""
    kind = rng.integers(3, size=n)[:, None]
    gray = rng.uniform(0.15, 0.5, (n, 1, 1)) + rng.uniform(-0.1, 0.1, (n, 2, 1))
    turn = rng.uniform(0, 2 * np.pi, (n, 1 + _WAVES))
    direction = np.stack([np.cos(turn), np.sin(turn)], -1)
    periods = np.where(kind == 1, rng.uniform(2, 7, (n, _WAVES)), rng.uniform(1, 12, (n, _WAVES)))
    first_only = np.arange(_WAVES) == 0
    texture = rng.uniform(0.2, 0.8, (n, _WAVES))
    values = {
        "background_rgb": np.clip(gray + rng.uniform(-0.07, 0.07, (n, 2, 3)), 0, 1),
        "ramp": np.where(kind == 0, rng.uniform(1.0, 4.0, (n, 1)), rng.uniform(0, 0.5, (n, 1))) * direction[:, 0],
        "wave_vectors": periods[..., None] * direction[:, 1:],
        "wave_phases": rng.uniform(0, 2 * np.pi, (n, _WAVES)),
        "wave_weights": np.choose(kind, [np.zeros_like(texture), first_only * texture[:, :1] * 4, texture]),
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


def training_rng(seed: int, step: int) -> np.random.Generator:
    """The random generator of one training step. Each step has new scenes, never held-out ones."""
    return np.random.default_rng([_TRAINING, seed, step])


def held_out_scenes(n: int, first: int = 0) -> Scenes:
    """Held-out scenes `first` to `first + n - 1`, from seeds that no training run uses."""
    return Scenes.joined([sample_scenes(np.random.default_rng([_HELD_OUT, first + i]), 1) for i in range(n)])

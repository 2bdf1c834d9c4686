"""Renders a batch of scenes at any resolution.

One table holds all shapes: the distance of the outline from the centre in each direction.
"""

from __future__ import annotations

import functools

import numpy as np

from examples.moving_shapes.generator.scenes import SHAPES, Scenes

CLIP_FRAMES = 16
CLIP_SIZE = 128
SEEN_FRAMES = (1, 5, 9, 13)
"""The frames of a 16-frame clip that a model with 4 frames sees: the middle of each quarter."""

_MIDDLE = sum(SEEN_FRAMES) / len(SEEN_FRAMES)
_ANGLES = 1440


def render(
    scenes: Scenes,
    frames: np.ndarray | tuple[int, ...],
    pixels: np.ndarray,
    size: int,
    softness: np.ndarray | float = 1.0,
) -> np.ndarray:
    """Draw some frames and pixels of each scene.

    Args:
        scenes: n scenes.
        frames: T frame indices of the 16-frame clip.
        pixels: P indices. They select rows, and columns, of an image with side `size`.
        softness: width of the shapes' edges in pixels of that image, one number or `(n,)`.

    Returns:
        `(n, T, P, P, 3)` float32 from 0 to 1.
    """
    at = ((np.asarray(pixels) + 0.5) / size).astype(np.float32)
    u = _time(frames)
    background = _backgrounds(scenes, at)[:, None]
    cover = _cover(scenes, at, u, np.broadcast_to(np.float32(softness) / np.float32(size), len(scenes)))[..., None]
    return background + cover * (scenes.rgb[:, None, None, None] - background)


def training_frames(
    scenes: Scenes, rng: np.random.Generator, image_size: int = 32, frames: tuple[int, ...] = SEEN_FRAMES
) -> np.ndarray:
    """The frames that a model sees of each scene, with artefacts like those of video encoding.

    Nearest-neighbour resizing of the 128-pixel clip picks the same pixels. Edges are soft, brightness and contrast vary
    slightly from clip to clip, and there is noise.

    Returns:
        `(n, T, image_size, image_size, 3)` uint8.
    """
    pixels = np.arange(image_size) * CLIP_SIZE // image_size
    return _recorded(render(scenes, frames, pixels, CLIP_SIZE, rng.uniform(1, 4, len(scenes)).astype(np.float32)), rng)


def training_picture(scenes: Scenes, rng: np.random.Generator, image_size: int = 64) -> np.ndarray:
    """One frame with the shapes of all scenes, at u = 0, on the background of the first, with the same artefacts.

    Returns:
        `(1, image_size, image_size, 3)` uint8.
    """
    at = ((np.arange(image_size) * CLIP_SIZE // image_size + 0.5) / CLIP_SIZE).astype(np.float32)
    edge = np.full(len(scenes), rng.uniform(1, 4) / CLIP_SIZE, np.float32)
    image = _backgrounds(scenes[0], at)[0]
    for cover, rgb in zip(_cover(scenes, at, np.zeros(1, np.float32), edge)[:, 0, ..., None], scenes.rgb, strict=True):
        image = image + cover * (rgb - image)
    return _recorded(image[None, None], rng)[0]


def boxes(scenes: Scenes, frame: int) -> np.ndarray:
    """`(n, 4)`: (center x, center y, width, height) of each scene's shape in a frame of the 16-frame clip."""
    center, radius = _motion(scenes, _time(frame)[None])
    low, high = np.stack([(outline.min(0), outline.max(0)) for outline in map(_corners, SHAPES)], 1)
    low, high = (center[:, 0] + radius * side[scenes.shape] for side in (low, high))
    low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
    return np.concatenate([(low + high) / 2, high - low], 1)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Round floats from 0 to 1 to the nearest of 256 levels."""
    return (np.clip(image, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def _recorded(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Frames `(n, T, P, P, 3)` from 0 to 1 as uint8, with other brightness and contrast, and noise."""
    per_clip = (len(image), 1, 1, 1, 1)
    image *= rng.uniform(0.94, 1.06, per_clip).astype(np.float32)
    image += rng.uniform(-0.04, 0.04, per_clip).astype(np.float32)
    image += rng.standard_normal(image.shape, np.float32) * rng.uniform(0, 0.03, per_clip).astype(np.float32)
    return to_uint8(image)


def _backgrounds(scenes: Scenes, at: np.ndarray) -> np.ndarray:
    """`(n, P, P, 3)`: two colours, mixed by a ramp and a few plane waves."""
    x, y = at[None, None, :], at[None, :, None]

    def plane(vectors: np.ndarray) -> np.ndarray:
        return vectors[:, 0, None, None] * x + vectors[:, 1, None, None] * y

    mixture = plane(scenes.ramp) - scenes.ramp.sum(-1)[:, None, None] / 2
    for k in range(scenes.wave_weights.shape[1]):
        some = np.flatnonzero(scenes.wave_weights[:, k])
        phase = scenes.wave_phases[some, k, None, None]
        wave = np.sin(np.float32(2 * np.pi) * plane(scenes.wave_vectors[some, k]) + phase)
        mixture[some] += scenes.wave_weights[some, k, None, None] * wave
    share = (0.5 + 0.5 * np.tanh(mixture))[..., None]
    first, second = scenes.background_rgb[:, 0, None, None], scenes.background_rgb[:, 1, None, None]
    return first + share * (second - first)


def _time(frames: np.ndarray | tuple[int, ...] | int) -> np.ndarray:
    """The time u of frames of the 16-frame clip."""
    return ((np.asarray(frames) - _MIDDLE) / (CLIP_FRAMES / 2)).astype(np.float32)


def _motion(scenes: Scenes, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centers `(n, T, 2)` and radii `(n, T)` of the shapes at times `(T,)`."""
    center = scenes.center[:, None] + scenes.velocity[:, None] * u[None, :, None]
    return center, scenes.radius[:, None] * np.exp(scenes.growth[:, None] * u[None])


def _cover(scenes: Scenes, at: np.ndarray, u: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """`(n, T, P, P)`: the share of each pixel that the shape covers, from 0 to 1."""
    center, radius = _motion(scenes, u)
    dx = at[None, None, None, :] - center[..., 0, None, None]
    dy = at[None, None, :, None] - center[..., 1, None, None]
    turn = np.arctan2(dy, dx) * np.float32(_ANGLES / (2 * np.pi))
    turn = np.floor(turn).astype(np.int32)
    turn += np.where(turn < 0, _ANGLES, 0).astype(np.int32)
    outline = _outlines()[scenes.shape[:, None, None, None], turn]
    inside = outline * radius[..., None, None] - np.sqrt(dx * dx + dy * dy)
    return np.clip(inside / edge[:, None, None, None] + np.float32(0.5), 0, 1)


def _corners(shape: str) -> np.ndarray:
    """`(corners, 2)` of a shape with radius 1, sorted by angle."""
    if shape == "circle":
        turn = np.linspace(-np.pi, np.pi, 90, endpoint=False)
        return np.stack([np.cos(turn), np.sin(turn)], -1)
    if shape == "square":
        return 0.95 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    if shape == "triangle":
        return np.array([(0, -1.25), (1.15, 0.9), (-1.15, 0.9)])
    if shape == "star":
        turn = -np.pi / 2 + np.arange(10) * np.pi / 5
        reach = np.where(np.arange(10) % 2, 0.5, 1.3)
        return reach[:, None] * np.stack([np.cos(turn), np.sin(turn)], -1)
    if shape == "cross":
        a, b = 0.36, 1.2
        quarter = np.array([(a, -b), (a, -a), (b, -a)])
        turned = [quarter]
        for _ in range(3):
            turned.append(np.stack([-turned[-1][:, 1], turned[-1][:, 0]], -1))
        return np.concatenate(turned)
    if shape == "diamond":
        return np.array([(0, -1.3), (0.85, 0), (0, 1.3), (-0.85, 0)])
    raise ValueError(f"no outline for the shape {shape!r}")


@functools.cache
def _outlines() -> np.ndarray:
    """`(shapes, angles)`: distance of each outline from the centre, for angles from 0 to 2π, y downwards."""
    turn = (np.arange(_ANGLES) + 0.5) * 2 * np.pi / _ANGLES
    ray = np.stack([np.cos(turn), np.sin(turn)], -1)[:, None]
    rows = []
    for shape in SHAPES:
        start = _corners(shape)[None]
        end = np.roll(start, -1, axis=1)
        # The ray crosses the edge from start to end if it points between them.
        between = (_cross(start, ray) >= 0) & (_cross(ray, end) >= 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = _cross(start, end) / _cross(ray, end - start)
        rows.append(np.where(between & (distance > 0), distance, np.inf).min(axis=1))
    return np.array(rows, np.float32)


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]

"""Draws a scene of the shapes task as an RGB picture."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trainers.tasks.shapes.grammar import COLOURS, Scene

SIZE = 64
"""Pixels a side. Each corner is a cell of 32 by 32."""
BACKGROUND = (245, 245, 245)
RADIUS = (9.0, 12.0)
"""Half the side of a shape's box, in pixels: the smallest and the largest that is drawn."""
JITTER = 2.0
"""How far, in pixels, a shape's middle may lie from the middle of its place."""

CENTRES: dict[str, tuple[float, float]] = {
    "top left": (16, 16),
    "top right": (16, 48),
    "bottom left": (48, 16),
    "bottom right": (48, 48),
    "centre": (32, 32),
}
"""Middle of each place: row, column, in pixels."""

Grid = NDArray[np.float64]
INSIDE: dict[str, Callable[[Grid, Grid], NDArray[np.bool_]]] = {
    "circle": lambda y, x: x**2 + y**2 <= 1,
    "square": lambda y, x: np.maximum(abs(x), abs(y)) <= 0.9,
    "triangle": lambda y, x: (y <= 0.95) & (abs(x) <= (y + 0.95) / 1.9),
    "cross": lambda y, x: np.minimum(abs(x), abs(y)) <= 0.33,
    "diamond": lambda y, x: abs(x) + abs(y) <= 1,
}
"""Whether a point of the box [-1, 1]² belongs to the shape; y grows downwards."""


def draw(scene: Scene, rng: random.Random, size: int = SIZE) -> NDArray[np.uint8]:
    """The picture of a scene, [size, size, 3]; `rng` moves and scales each shape a little."""
    picture = np.empty((size, size, 3))
    picture[:] = BACKGROUND
    scale = size / SIZE
    for thing in scene.things:
        row, column = CENTRES[thing.place or "centre"]
        row += rng.uniform(-JITTER, JITTER)
        column += rng.uniform(-JITTER, JITTER)
        radius = rng.uniform(*RADIUS)
        cover = coverage(thing.shape, row * scale, column * scale, radius * scale, size)[..., None]
        picture = picture * (1 - cover) + cover * np.array(COLOURS[thing.colour or "red"])
    return picture.round().astype(np.uint8)


def coverage(shape: str, row: float, column: float, radius: float, size: int) -> Grid:
    """How much of each pixel the shape covers, [size, size] in [0, 1], from 4 × 4 samples."""
    samples = 4
    axis = (np.arange(size * samples) + 0.5) / samples
    y, x = (axis[:, None] - row) / radius, (axis[None, :] - column) / radius
    inside = (abs(x) <= 1) & (abs(y) <= 1) & INSIDE[shape](y, x)
    return inside.reshape(size, samples, size, samples).mean(axis=(1, 3))

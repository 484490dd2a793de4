"""Reads a picture of the shapes task back: which shapes, which colours, how many, where.

An exact judge: connected parts of what is not background, each compared with the drawn templates
of all shapes. Nothing here is learned, so its word does not depend on any model.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from trainers.tasks.shapes.draw import BACKGROUND, CENTRES, SIZE, coverage
from trainers.tasks.shapes.grammar import COLOURS, SHAPES, Request, Thing, parse

FOREGROUND_DISTANCE = 70.0
"""RGB distance from the background beyond which a pixel belongs to a thing."""
COLOUR_DISTANCE = 70.0
"""RGB distance to the nearest colour's own value beyond which a thing has no colour we know."""
SMALLEST = 40
"""Pixels (at 64 px) below which a part is a speck, not a thing."""
LEAST_OVERLAP = 0.72
"""Intersection over union with the best template below which a part has no shape we know."""
PLACE_DISTANCE = 9.0
"""Pixels (at 64 px) from a place's middle within which a thing is at that place."""
EXTENT = dict.fromkeys(SHAPES, 1.0) | {"square": 0.9, "triangle": 0.97}
"""Half the side of a shape's tight box, as a part of its radius."""


def judge(picture: Image.Image, caption: str) -> bool:
    """Whether the picture shows exactly what the caption asks for."""
    return satisfies(see(picture), parse(caption))


def family(caption: str) -> str:
    """The family under which a caption's verdict is counted."""
    return parse(caption).family


def see(picture: Image.Image) -> list[tuple[Thing, float, float]]:
    """The things in a picture, each with the row and column of its middle at 64 px.

    A part whose shape or colour is none of the task's is given the name "?": it counts as a thing,
    so that a smear beside the right answer is not overlooked.
    """
    if picture.size != (SIZE, SIZE):
        picture = picture.resize((SIZE, SIZE), Image.Resampling.BOX)
    rgb = np.asarray(picture.convert("RGB"), dtype=np.float64)
    foreground = np.linalg.norm(rgb - BACKGROUND, axis=-1) > FOREGROUND_DISTANCE
    labels, _ = ndimage.label(foreground)
    things = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        part = labels == label
        if part.sum() < SMALLEST:
            continue
        rows, columns = box
        row, column = (rows.start + rows.stop) / 2, (columns.start + columns.stop) / 2
        side = max(rows.stop - rows.start, columns.stop - columns.start)
        things.append((Thing(_shape(part, row, column, side), _colour(rgb, part)), row, column))
    return things


def satisfies(seen: list[tuple[Thing, float, float]], request: Request) -> bool:
    """Whether what was seen is what was asked for, no more and no less."""
    if Counter(thing.shape for thing, _, _ in seen) != Counter(t.shape for t in request.things):
        return False
    if request.family == "counting":
        return True
    # Outside counting, the shapes of one request differ, so a shape names its thing.
    by_shape = {thing.shape: (thing, row, column) for thing, row, column in seen}
    for asked in request.things:
        thing, row, column = by_shape[asked.shape]
        if asked.colour is not None and thing.colour != asked.colour:
            return False
        if asked.place is not None:
            centre_row, centre_column = CENTRES[asked.place]
            if np.hypot(row - centre_row, column - centre_column) > PLACE_DISTANCE:
                return False
    if request.relation is None:
        return True
    (_, row, column), (_, other_row, other_column) = (by_shape[t.shape] for t in request.things)
    down, right = other_row - row, other_column - column
    ahead, aside = {
        "above": (down, right),
        "below": (-down, right),
        "left of": (right, down),
        "right of": (-right, down),
    }[request.relation]
    return bool(ahead > abs(aside))


def _shape(part: NDArray[np.bool_], row: float, column: float, side: float) -> str:
    overlaps = {}
    for shape in SHAPES:
        template = coverage(shape, row, column, side / 2 / EXTENT[shape], SIZE) > 0.5
        overlaps[shape] = (part & template).sum() / (part | template).sum()
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= LEAST_OVERLAP else "?"


def _colour(rgb: NDArray[np.float64], part: NDArray[np.bool_]) -> str:
    inner = ndimage.binary_erosion(part)
    median = np.median(rgb[inner if inner.any() else part], axis=0)
    distances = {name: float(np.linalg.norm(median - value)) for name, value in COLOURS.items()}
    best = min(distances, key=lambda name: distances[name])
    return best if distances[best] <= COLOUR_DISTANCE else "?"

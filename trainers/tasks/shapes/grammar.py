"""What the shapes task can say: captions, the scenes they allow, and what training never shows.

A caption asks for one scene out of GenEval's six families (single object, two objects, counting,
colours, position, colour attribution). A scene is what a picture shows: shapes with a colour at a
place. Some combinations are *held out*: no training picture shows them, whatever its caption, so a
score on captions that ask for them means composition and not memory.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product
from typing import Literal

from storage.errors import EspalierError

Family = Literal["single object", "two objects", "counting", "colours", "position", "attribution"]
FAMILIES: tuple[Family, ...] = (
    "single object", "two objects", "counting", "colours", "position", "attribution",
)  # fmt: skip

SHAPES = ("circle", "square", "triangle", "cross", "diamond")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 220),
    "yellow": (240, 205, 40),
    "purple": (150, 50, 180),
    "cyan": (50, 200, 215),
}
COUNTS = {"two": 2, "three": 3, "four": 4}
PLAIN = "cyan"
"""Of a thing whose caption names no colour. No held-out combination has it."""
CORNERS = ("top left", "top right", "bottom left", "bottom right")
PLACES = (*CORNERS, "centre")
ROOM = ("top left", "bottom right", "top right", "bottom left")
"""Where several things stand when the caption does not say: the first two on a diagonal, which is
in no relation that a caption could name."""
RELATIONS = ("above", "below", "left of", "right of")

HELD_OUT_COLOUR_SHAPE = frozenset(
    [("red", "triangle"), ("green", "circle"), ("blue", "cross"), ("yellow", "square"),
     ("purple", "diamond")]
)  # fmt: skip
HELD_OUT_SHAPE_PLACE = frozenset(
    [("circle", "bottom left"), ("square", "top right"), ("cross", "top left"),
     ("triangle", "bottom right")]
)  # fmt: skip
"""Of a thing alone in its picture: four equal shapes fill every corner whatever is held out."""
HELD_OUT_SHAPE_PAIR = frozenset(
    [frozenset(["circle", "diamond"]), frozenset(["square", "cross"])]
)  # fmt: skip
HELD_OUT_COUNT_SHAPE = frozenset([(2, "cross"), (3, "square"), (4, "triangle")])
HELD_OUT_POSITION = frozenset(
    [("circle", "above", "triangle"), ("cross", "above", "diamond"),
     ("square", "above", "circle"), ("triangle", "left of", "square"),
     ("diamond", "left of", "square"), ("cross", "left of", "circle")]
)  # fmt: skip
"""Only `above` and `left of`: the other two relations say the same with the shapes exchanged."""

OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


class CaptionError(EspalierError):
    """A caption that the shapes task cannot read."""


@dataclass(frozen=True)
class Thing:
    """One asked-for or shown object; `None` leaves the choice open."""

    shape: str
    colour: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Request:
    """What a caption asks for. `relation` holds between the first and the second thing."""

    family: Family
    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def caption(self) -> str:
        first = self.things[0]
        if self.family == "counting":
            word = next(word for word, n in COUNTS.items() if n == len(self.things))
            return f"{word} {PLURALS[first.shape]}"
        if self.family == "single object":
            where = "in the centre" if first.place == "centre" else f"at the {first.place}"
            return f"{_noun(first)} {where}"
        return f" {self.relation or 'and'} ".join(_noun(thing) for thing in self.things)


@dataclass(frozen=True)
class Scene:
    """What one picture shows: every thing has a colour and a place of its own."""

    things: tuple[Thing, ...]

    def shows_held_out(self) -> bool:
        """Whether any held-out combination can be seen in the picture, named in words or not."""
        things = self.things
        shapes = {thing.shape for thing in things}
        if any((thing.colour, thing.shape) in HELD_OUT_COLOUR_SHAPE for thing in things):
            return True
        if len(things) == 1 and (things[0].shape, things[0].place) in HELD_OUT_SHAPE_PLACE:
            return True
        if len(shapes) == 1 and (len(things), things[0].shape) in HELD_OUT_COUNT_SHAPE:
            return True
        if shapes in HELD_OUT_SHAPE_PAIR:
            return True
        return any(
            (a.shape, relation, b.shape) in HELD_OUT_POSITION
            for a, b in permutations(things, 2)
            for relation in RELATIONS
            if stands(a.place, relation, b.place)
        )


def stands(place: str | None, relation: str, other: str | None) -> bool:
    """Whether a thing at corner `place` stands in `relation` to one at corner `other`.

    >>> stands("top left", "above", "bottom left"), stands("top left", "above", "bottom right")
    (True, False)
    """
    if place not in CORNERS or other not in CORNERS:
        return False
    (row, column), (other_row, other_column) = place.split(), other.split()
    match relation:
        case "above":
            return (row, other_row) == ("top", "bottom") and column == other_column
        case "left of":
            return (column, other_column) == ("left", "right") and row == other_row
        case _:
            return stands(other, OPPOSITE[relation], place)


def asks_held_out(request: Request) -> bool:
    """Whether the words of the caption alone ask for a held-out combination."""
    if request.relation is not None:
        a, b = (thing.shape for thing in request.things)
        relation = request.relation
        if relation not in ("above", "left of"):
            a, b, relation = b, a, OPPOSITE[relation]
        if (a, relation, b) in HELD_OUT_POSITION:
            return True
    return Scene(request.things).shows_held_out()


def requests(family: Family) -> Iterator[Request]:
    """Every request of a family, in a fixed order."""
    shape_pairs = list(permutations(SHAPES, 2))
    colour_pairs = list(permutations(COLOURS, 2))
    match family:
        case "single object":
            for shape, place in product(SHAPES, PLACES):
                yield Request(family, (Thing(shape, place=place),))
        case "two objects":
            for a, b in shape_pairs:
                yield Request(family, (Thing(a), Thing(b)))
        case "counting":
            for count, shape in product(COUNTS.values(), SHAPES):
                yield Request(family, (Thing(shape),) * count)
        case "colours":
            for colour, shape in product(COLOURS, SHAPES):
                yield Request(family, (Thing(shape, colour),))
        case "position":
            for (a, b), relation in product(shape_pairs, RELATIONS):
                yield Request(family, (Thing(a), Thing(b)), relation)
                for c, d in colour_pairs:
                    yield Request(family, (Thing(a, c), Thing(b, d)), relation)
        case "attribution":
            for (a, b), (c, d) in product(shape_pairs, colour_pairs):
                yield Request(family, (Thing(a, c), Thing(b, d)))


def held_out_requests(per_family: int, seed: int = 0) -> list[Request]:
    """`per_family` requests of each family that ask for something training never showed.

    A family with fewer such captions than asked for repeats them: a repeated caption is another
    draw, from another noise.
    """
    rng = random.Random(seed)
    chosen: list[Request] = []
    for family in FAMILIES:
        novel = [request for request in requests(family) if asks_held_out(request)]
        rng.shuffle(novel)
        if family == "position":  # plain captions are 1 in 31: show both kinds equally
            plain = [r for r in novel if r.things[0].colour is None]
            coloured = [r for r in novel if r.things[0].colour is not None]
            novel = [r for pair in zip(plain * 99, coloured, strict=False) for r in pair]
        chosen += [novel[i % len(novel)] for i in range(per_family)]
    return chosen


def compose(request: Request, rng: random.Random, held_out: bool = False) -> Scene:
    """A scene that satisfies `request`; `rng` decides between the places that do.

    With `held_out=False` scenes that show a held-out combination are drawn again, so the request
    itself must not ask for one.
    """
    while True:
        scene = _compose(request, rng)
        if held_out or not scene.shows_held_out():
            return scene


def sample_training_request(rng: random.Random) -> Request:
    """One caption of the training distribution: families equally likely, nothing held out."""
    while True:
        request = _sample(rng.choice(FAMILIES), rng)
        if not asks_held_out(request):
            return request


def parse(caption: str) -> Request:
    """The request that a caption makes.

    Raises:
        CaptionError: the words are not of this task's grammar.
    """
    words = caption.strip().lower().rstrip(".")
    for count_word, count in COUNTS.items():
        for shape, plural in PLURALS.items():
            if words == f"{count_word} {plural}":
                return Request("counting", (Thing(shape),) * count)
    if match := re.fullmatch(rf"a ({'|'.join(SHAPES)}) (?:at the|in the) (.+)", words):
        shape, place = match.groups()
        if place in PLACES:
            return Request("single object", (Thing(shape, place=place),))
    noun = rf"a (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})"
    if (match := re.fullmatch(noun, words)) and match[1]:
        return Request("colours", (Thing(match[2], match[1]),))
    if match := re.fullmatch(rf"{noun} (and|{'|'.join(RELATIONS)}) {noun}", words):
        things = (Thing(match[2], match[1]), Thing(match[5], match[4]))
        if match[3] != "and":
            return Request("position", things, match[3])
        if match[1] and match[4]:
            return Request("attribution", things)
        if not match[1] and not match[4]:
            return Request("two objects", things)
    raise CaptionError(
        f"caption {caption!r} is not one the shapes task can judge; "
        "it reads captions such as 'a red circle above a blue square' or 'three crosses'"
    )


def _noun(thing: Thing) -> str:
    return f"a {thing.colour} {thing.shape}" if thing.colour else f"a {thing.shape}"


def _sample(family: Family, rng: random.Random) -> Request:
    a, b = rng.sample(SHAPES, 2)
    c, d = rng.sample(list(COLOURS), 2)
    match family:
        case "single object":
            return Request(family, (Thing(a, place=rng.choice(PLACES)),))
        case "two objects":
            return Request(family, (Thing(a), Thing(b)))
        case "counting":
            return Request(family, (Thing(a),) * rng.choice(list(COUNTS.values())))
        case "colours":
            return Request(family, (Thing(a, c),))
        case "position":
            plain = rng.random() < 0.5
            things = (Thing(a), Thing(b)) if plain else (Thing(a, c), Thing(b, d))
            return Request(family, things, rng.choice(RELATIONS))
        case "attribution":
            return Request(family, (Thing(a, c), Thing(b, d)))


def _compose(request: Request, rng: random.Random) -> Scene:
    things = request.things
    if request.relation is not None:
        pairs = [
            pair for pair in permutations(CORNERS, 2) if stands(pair[0], request.relation, pair[1])
        ]
        places: tuple[str, ...] = rng.choice(pairs)
    elif len(things) == 1:
        places = (things[0].place or "centre",)
    else:
        places = ROOM[: len(things)]
    return Scene(
        tuple(
            Thing(thing.shape, thing.colour or PLAIN, place)
            for thing, place in zip(things, places, strict=True)
        )
    )

"""The shapes task: what is drawn is judged right, what differs is judged wrong, nothing leaks."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainers.tasks import TASKS
from trainers.tasks.shapes.draw import draw
from trainers.tasks.shapes.grammar import (
    COLOURS,
    CORNERS,
    FAMILIES,
    SHAPES,
    CaptionError,
    Request,
    Scene,
    asks_held_out,
    compose,
    held_out_requests,
    parse,
    requests,
    sample_training_request,
)

TASK = TASKS["shapes"]
ALL = [request for family in FAMILIES for request in requests(family)]
any_request = st.sampled_from(ALL)
seeds = st.integers(0, 10**6)


def picture_of(scene: Scene, rng: random.Random) -> Image.Image:
    return Image.fromarray(draw(scene, rng))


@given(request=any_request, seed=seeds)
def test_every_scene_of_a_caption_is_judged_right(request: Request, seed: int):
    rng = random.Random(seed)
    picture = picture_of(compose(request, rng, held_out=True), rng)
    assert TASK.judge(picture, request.caption)


@given(request=any_request, seed=seeds, data=st.data())
def test_a_scene_with_one_thing_changed_is_judged_wrong(
    request: Request, seed: int, data: st.DataObject
):
    rng = random.Random(seed)
    things = list(compose(request, rng, held_out=True).things)
    which = data.draw(st.integers(0, len(things) - 1))
    asked = request.things[which]
    present = {thing.shape for thing in things}
    changes = [replace(things[which], shape=s) for s in SHAPES if s not in present]
    if asked.colour:
        changes += [replace(things[which], colour=c) for c in COLOURS if c != asked.colour]
    if asked.place:
        others = [p for p in (*CORNERS, "centre") if p != asked.place]
        changes += [replace(things[which], place=p) for p in others]
    things[which] = data.draw(st.sampled_from(changes))
    assert not TASK.judge(picture_of(Scene(tuple(things)), rng), request.caption)


@given(request=any_request, seed=seeds)
def test_a_missing_or_an_extra_thing_is_judged_wrong(request: Request, seed: int):
    rng = random.Random(seed)
    scene = compose(request, rng, held_out=True)
    assert not TASK.judge(picture_of(Scene(scene.things[1:]), rng), request.caption)
    taken = {thing.place for thing in scene.things}
    free = [place for place in CORNERS if place not in taken]
    if free and "centre" not in taken:
        extra = Scene((*scene.things, replace(scene.things[0], place=free[0])))
        assert not TASK.judge(picture_of(extra, rng), request.caption)


@given(seed=seeds)
def test_a_relation_turned_round_is_judged_wrong(seed: int):
    rng = random.Random(seed)
    request = rng.choice([r for r in ALL if r.relation])
    first, second = compose(request, rng, held_out=True).things
    swapped = Scene((replace(first, place=second.place), replace(second, place=first.place)))
    assert not TASK.judge(picture_of(swapped, rng), request.caption)


@given(seed=seeds)
def test_no_training_scene_shows_a_held_out_combination(seed: int):
    rng = random.Random(seed)
    request = sample_training_request(rng)
    assert not asks_held_out(request)
    assert not compose(request, rng).shows_held_out()


@given(request=any_request)
def test_captions_read_back_as_what_they_ask(request: Request):
    assert parse(request.caption) == request
    assert TASK.family(request.caption) == request.family


def test_held_out_captions_are_many_per_family_and_repeatable():
    captions = TASK.held_out_captions(per_family=10, seed=3)
    assert captions == TASK.held_out_captions(per_family=10, seed=3)
    counted = [TASK.family(caption) for caption in captions]
    assert {family: counted.count(family) for family in TASK.families} == dict.fromkeys(
        TASK.families, 10
    )
    assert all(asks_held_out(request) for request in held_out_requests(10, 3))


def test_an_unreadable_caption_is_named():
    with pytest.raises(CaptionError, match="a purple horse"):
        TASK.judge(Image.new("RGB", (64, 64)), "a purple horse")


def test_noise_and_emptiness_are_judged_wrong():
    empty = Image.new("RGB", (64, 64), (245, 245, 245))
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    assert not any(TASK.judge(p, "a red circle") for p in (empty, noise))

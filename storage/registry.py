"""The registry of published models: one small object an entry, never changed; the best is computed.

Nothing is kept up to date in place, so any number of sweeps that publish at once lose no entry, on
stores without conditional writes too. A model is written whole, under a name of its own, before its
entry: whoever asks for the best gets a whole one, also while a better one is being published.

best/BUDGET holds a copy, under the names that diffusers asks for, which are those of every model.
While it is replaced, and where that was cut off until `show_best` is called again, it has no
manifest, and may have files of two models.

The name of an entry's object carries a digest of it. One that is not what was added is believed by
nobody and stops nobody.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Annotated

from pydantic import AwareDatetime, Field, NonNegativeInt, ValidationError

from storage import layout
from storage.digest import digest_json
from storage.errors import DamagedError, MissingKey, StoreError
from storage.manifest import Body, alike, in_common, publish, published, twice, verify, withdraw
from storage.section import Section
from storage.store import Store

_log = logging.getLogger(__name__)

_ATTEMPTS = 5
"""How often a copy of the best is made while others make theirs."""

_Finite = Annotated[float, Field(allow_inf_nan=False)]


class Entry(Section):
    """One published model."""

    budget: str
    """The budget's label, such as "10B" or "50pct"."""
    plan_digest: str
    """Digest of the student's plan."""
    teacher: str
    """Digest of the teacher; losses of different teachers do not compare."""
    sweep: str
    """The sweep that found it."""
    prefix: str
    """Where the recovered student lies in this store."""
    model: str | None = None
    """Where the diffusers model made of it lies; entries of the first version do not say."""
    parameters: NonNegativeInt
    """Parameters of the student's transformer."""
    fidelity_loss: _Finite
    """Mean squared difference to the teacher's velocity on held-out latents."""
    judge_score: _Finite | None = None
    """What the task's judge says of its pictures, 0 to 1; null when there is no judge."""
    judged: NonNegativeInt = 0
    """How many pictures the judge saw; 0 of an entry from before they were counted, whose score is
    taken as it is."""
    created: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    """When it was published."""


def add(store: Store, entry: Entry) -> str:
    """Add the entry and return its key; adding it again changes nothing."""
    key = _key(entry)
    store.write(key, entry.model_dump_json(indent=1).encode())
    return key


def entries(store: Store, budget: str | None = None) -> list[Entry]:
    """Entries of one budget, or of all, oldest first; damaged ones are passed over with a
    warning."""
    whole, damaged = look(store, budget)
    for error in damaged.values():
        _log.warning("%s; passing it over", error)
    return whole


def look(store: Store, budget: str | None = None) -> tuple[list[Entry], dict[str, DamagedError]]:
    """Entries of one budget, or of all, oldest first, and by key what is wrong with the others."""
    found = dict(_by_key(store, layout.registry() if budget is None else layout.registered(budget)))
    whole = [entry for entry in found.values() if isinstance(entry, Entry)]
    damaged = {key: error for key, error in found.items() if isinstance(error, DamagedError)}
    return sorted(whole, key=lambda entry: (entry.created, entry.plan_digest)), damaged


def best(store: Store, budget: str, teacher: str | None = None) -> Entry | None:
    """The best entry of a budget, of one teacher or of any; None when there is none.

    Judged entries come before unjudged ones: the highest score that its pictures make sure of, the
    highest score, the lowest fidelity loss; among unjudged ones the lowest fidelity loss.
    (Comparing by judge score only where both have one would let three entries beat each other in a
    circle.) Then fewer parameters, then the older entry.
    """
    candidates = [e for e in entries(store, budget) if teacher is None or e.teacher == teacher]
    return min(candidates, key=rank, default=None)


def show_best(store: Store, budget: str) -> str | None:
    """Makes best/BUDGET a copy of the budget's best model, for whoever opens it by that address.

    Returns the prefix of the model that it shows; None when there is none, nor then a copy.

    Any number of processes may do so at once: each looks at what came of it, and mends it when
    another wrote between its own files or entered a better model. StoreError when they do not come
    to an end.
    """
    prefix, spoiled = layout.best(budget), False
    for _ in range(_ATTEMPTS):
        entry = best(store, budget)
        place = entry.model if entry else None
        model = published(store, place) if place else None
        if place is None or model is None:
            withdraw(store, prefix)
            return None
        try:
            shown = None if spoiled else published(store, prefix)
            if not alike(shown, model):
                # Models of one teacher have all but the transformer in common: the less is written,
                # the sooner the copy is whole again.
                kept = in_common(shown, model)
                files: dict[str, Body] = {
                    name: partial(store.read, file.key(place, name))
                    for name, file in model.files.items()
                    if name not in kept
                }
                publish(store, prefix, files, model.meta, kept)
                verify(store, prefix)
            spoiled = False
            if alike(published(store, prefix), model) and best(store, budget) == entry:
                return place
        except (DamagedError, MissingKey):
            spoiled = True
    raise StoreError(
        f"{store.url}/{prefix}: others keep writing to it; run `espalier publish` again"
    )


def keep_best(
    store: Store, budget: str, teacher: str, count: int, made: str | None = None
) -> list[Entry]:
    """Remove all but the best `count` models of a budget and teacher, and that at `made`, which its
    maker has yet to be told of; the entries that went."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    mine = [entry for entry in entries(store, budget) if entry.teacher == teacher]
    beyond = [e for e in sorted(mine, key=rank)[count:] if made is None or e.model != made]
    for entry in beyond:
        withdraw_entry(store, entry)
    return beyond


def withdraw_entry(store: Store, entry: Entry) -> None:
    """Remove the entry, and its model unless another entry names it."""
    remove(store, entry)
    if entry.model and all(e.model != entry.model for e in entries(store, entry.budget)):
        withdraw(store, entry.model)


def remove(store: Store, entry: Entry) -> None:
    """Remove the entry; nothing happens when it is not there."""
    # Not by `_key`: of an entry from before it had all of its fields that is another.
    for key, found in _by_key(store, layout.registered(entry.budget)):
        if found == entry:
            store.remove(key)


def _key(entry: Entry) -> str:
    moment = entry.created.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    digest = digest_json(entry.model_dump(mode="json"))
    return f"{layout.registered(entry.budget)}/{moment}-{digest}.json"


def rank(entry: Entry) -> tuple[bool, float, float, float, int]:
    """The lower, the better; see `best`."""
    score = entry.judge_score
    sure = assured(score, entry.judged) if score is not None and entry.judged else score or 0.0
    return (score is None, -sure, -(score or 0.0), entry.fidelity_loss, entry.parameters)


def assured(score: float, pictures: int) -> float:
    """What a share of so many pictures is at least, with 97.5% certainty: the lower end of Wilson's
    interval. Scores of few pictures and of many then compare; of equally many, as they are."""
    spread = 1.96**2 / pictures
    middle, variance = score + spread / 2, score * (1 - score) + spread / 4
    return (middle - math.sqrt(spread * variance)) / (1 + spread)


def _by_key(store: Store, prefix: str) -> Iterator[tuple[str, Entry | DamagedError]]:
    """Every entry, or what is wrong with it."""
    for key in store.keys(prefix):
        try:
            with suppress(MissingKey):  # removed since it was listed
                yield key, twice(partial(_read, store, key))
        except DamagedError as error:
            yield key, error


def _read(store: Store, key: str) -> Entry:
    with store.read(key) as stream:
        content = stream.read()
    try:
        entry = Entry.model_validate_json(content)
    except ValidationError as error:
        raise _damaged(store, key, f"not a registry entry ({error.errors()[0]['msg']})") from None
    # Of the content itself: entries of the first version have fewer fields.
    if not key.endswith(f"-{digest_json(json.loads(content))}.json"):
        raise _damaged(store, key, "not the registry entry that was added (another digest)")
    return entry


def _damaged(store: Store, key: str, what: str) -> DamagedError:
    return DamagedError(
        f"{store.url}/{key}: {what}; remove it and its sweep's stages/publish from the store and "
        "run `espalier publish` again"
    )

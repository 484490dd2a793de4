"""What lies in a store and nothing refers to: looked for here, removed only by `discard`.

Ages are the store's own, so a wrong clock here takes nothing away. What other sweeps may use again
(encodings, analyses, the library) is never garbage while it is whole, and whatever lies outside
`layout.ROOTS` is somebody else's: a bucket may hold the pictures too.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

from pydantic import NonNegativeFloat, NonNegativeInt

from storage import layout
from storage.errors import DamagedError
from storage.folder import PARTIAL
from storage.manifest import MANIFEST, published, withdraw
from storage.registry import look
from storage.section import Section
from storage.store import Store, Stored, Unfinished

_log = logging.getLogger(__name__)

Kind = Literal[
    "unfinished upload", "unfinished publication", "old checkpoint", "unregistered model",
    "unpublished student",
]  # fmt: skip

KINDS: tuple[Kind, ...] = get_args(Kind)

# Small objects that are written one by one, without a manifest; and the copies of the best models,
# which lose theirs while they are replaced and keep what both have, however old: whoever replaces
# one mends what another left.
_BY_THEMSELVES = re.compile(
    r"(registry|studies|best)/|sweeps/[^/]+/(stages|search|confirmed|proposed|leases)/"
)
_CHECKPOINT = re.compile(r"((sweeps/[^/]+)/recovery/([^/]+)/([^/]+))/checkpoints/step-\d+$")
# Before sweeps had checkpoints of their own there was no name between.
_TRAINING = re.compile(r"(library/[^/]+/[^/]+)/checkpoints/([^/]+/)?step-\d+$")
_STUDENT = re.compile(r"sweeps/([^/]+)/recovery/[^/]+/[^/]+/student$")
_MODEL = re.compile(r"models/([^/]+)/[^/]+$")
_MODEL_FILE = re.compile(r"(models/[^/]+/[^/]+)/")
_PARALLEL = 8


class Garbage(Section):
    """Something that nothing refers to."""

    kind: Kind
    prefix: str
    """What it lies under; of an unfinished upload the key it is for."""
    keys: tuple[str, ...]
    """What would be removed; none of an unfinished upload."""
    size: NonNegativeInt
    """Bytes; 0 of an unfinished upload, of which stores do not say."""
    seconds: NonNegativeFloat
    """Since its youngest part was written."""
    upload: str | None = None
    """Id of an unfinished upload."""


def find_garbage(store: Store, older_than: float, students: bool = False) -> list[Garbage]:
    """All of it of which nothing was written for so many seconds; the `students` that sweeps ended
    with and did not publish only when asked for, since another judge might choose among them.

    The age is what keeps apart a write that is under way and one that was cut off.
    """
    bodies = {body.key: body for root in layout.ROOTS for body in store.listing(root)}
    published_at = _manifests(store, bodies)
    found = [*_unfinished_uploads(store)]
    held = {f"{prefix}/{name}" for prefix, names in published_at.items() for name in names}
    held |= {f"{prefix}/{MANIFEST}" for prefix in published_at}
    stray: dict[str, list[Stored]] = defaultdict(list)
    for key, body in bodies.items():
        if key not in held and not _BY_THEMSELVES.match(key):
            stray[_publication(key)].append(body)
    found += [_garbage("unfinished publication", prefix, of) for prefix, of in stray.items()]
    registered, damaged = look(store)
    named = {entry.model for entry in registered}
    sources = {entry.prefix for entry in registered}
    # Budgets of which it cannot be told what all their entries name.
    unsure = {key.split("/")[1] for key in damaged}
    for error in damaged.values():
        _log.warning("%s; until then every model of its budget stays", error)
    for prefix, names in published_at.items():
        mine = [bodies[key] for name in (*names, MANIFEST) if (key := f"{prefix}/{name}") in bodies]
        checkpoint, training = _CHECKPOINT.match(prefix), _TRAINING.match(prefix)
        ended = checkpoint is not None and _ended(store, checkpoint, published_at, bodies)
        if ended or (training is not None and training[1] in published_at):
            found.append(_garbage("old checkpoint", prefix, mine))
        elif (model := _MODEL.match(prefix)) and prefix not in named and model[1] not in unsure:
            found.append(_garbage("unregistered model", prefix, mine))
        elif students and (student := _STUDENT.match(prefix)):
            garbage = _garbage("unpublished student", prefix, mine)
            if prefix not in sources and _was_passed_over(store, student[1], garbage, bodies):
                found.append(garbage)
    old = [garbage for garbage in found if garbage.seconds >= older_than]
    return sorted(old, key=lambda garbage: (KINDS.index(garbage.kind), garbage.prefix))


def discard(store: Store, garbage: Garbage) -> None:
    """Remove it; what has gone meanwhile is fine."""
    if garbage.upload is not None:
        store.discard(Unfinished(garbage.prefix, garbage.upload, garbage.seconds))
    elif garbage.kind == "unfinished publication":
        for key in garbage.keys:
            store.remove(key)
    else:
        withdraw(store, garbage.prefix)


def _manifests(store: Store, bodies: Mapping[str, Stored]) -> dict[str, frozenset[str]]:
    """The names of the files published under each prefix; none of a manifest that is damaged."""
    prefixes = [key.rpartition("/")[0] for key in bodies if key.endswith(f"/{MANIFEST}")]

    def names(prefix: str) -> frozenset[str] | None:
        try:
            manifest = published(store, prefix)
        except DamagedError:
            # Nothing under it can be told from what it published, so all of it stays.
            return frozenset(k[len(prefix) + 1 :] for k in bodies if k.startswith(f"{prefix}/"))
        return manifest.stored if manifest else None

    with ThreadPoolExecutor(_PARALLEL) as pool:
        found = zip(prefixes, pool.map(names, prefixes), strict=True)
        return {prefix: files for prefix, files in found if files is not None}


def _unfinished_uploads(store: Store) -> Iterator[Garbage]:
    for write in store.unfinished(""):
        if write.key.partition("/")[0] not in (*layout.ROOTS, PARTIAL):
            continue
        yield Garbage(
            kind="unfinished upload",
            prefix=write.key,
            keys=(),
            size=0,
            seconds=max(0.0, write.seconds),
            upload=write.id,
        )


def _ended(
    store: Store,
    checkpoint: re.Match[str],
    published_at: Mapping[str, object],
    bodies: Mapping[str, object],
) -> bool:
    """Whether the recovery has its student, or its sweep has recovered without it: it noted that
    this one ended, or is at an end itself and was configured otherwise when this one began. Of one
    that broke off they are what it goes on from."""
    recovery, sweep, budget, trial = checkpoint.groups()
    if f"{recovery}/student" in published_at:
        return True
    name = sweep.partition("/")[2]
    done = layout.stage(name, "recover")
    try:
        record = published(store, done) if done in published_at else None
    except DamagedError:
        return False
    if record is None:
        return False
    facts: Any = record.meta.get("facts", {})
    for noted in facts.get("recoveries", ()):
        if (noted["budget"], noted["trial"]) == (budget, trial):
            return not noted.get("broke")
    return layout.attempt(name, "recover") not in bodies


def kept_students(store: Store, sweep: str) -> frozenset[str] | None:
    """The prefixes of the students that a sweep has published, of all that its recoveries ended
    with those that it needs from then on; None when it has published none."""
    record = published(store, layout.stage(sweep, "publish"))
    if record is None:
        return None
    facts: Any = record.meta.get("facts", {})
    return frozenset(said["finalist"] for said in facts.get("students", {}).values())


def _was_passed_over(
    store: Store, sweep: str, student: Garbage, bodies: Mapping[str, Stored]
) -> bool:
    """Whether its sweep has published others since it was there, and is at an end."""
    stages = (layout.attempt(sweep, stage) for stage in ("recover", "publish"))
    record = bodies.get(f"{layout.stage(sweep, 'publish')}/{MANIFEST}")
    if record is None or student.seconds < record.seconds or any(key in bodies for key in stages):
        return False
    try:
        return student.prefix not in (kept_students(store, sweep) or {student.prefix})
    except DamagedError:
        return False


def _publication(key: str) -> str:
    """What a file without a manifest was being published as: a model's folders come one after
    another, so the age of one alone says nothing."""
    model = _MODEL_FILE.match(key)
    return model[1] if model else key.rpartition("/")[0]


def _garbage(kind: Kind, prefix: str, bodies: list[Stored]) -> Garbage:
    return Garbage(
        kind=kind,
        prefix=prefix,
        keys=tuple(sorted(body.key for body in bodies)),
        size=sum(body.size for body in bodies),
        seconds=max(0.0, min(body.seconds for body in bodies)),
    )

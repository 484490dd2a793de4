"""Reads the library: replacements by what they replace and what they start from.

Of a trained one there are weights; one cut from the teacher is only measured, since any student is
cut from the teacher again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue, NonNegativeFloat, NonNegativeInt

from storage import layout
from storage.digest import digest_json
from storage.errors import EspalierError
from storage.manifest import published
from storage.section import Section
from storage.store import Store
from storage.tensors import load_tensors
from trainers.cache import local_copy
from trainers.library.config import TrainingConfig
from trainers.students.plan import BlockPlan

if TYPE_CHECKING:
    from torch import Tensor

TENSORS = "block.safetensors"
LOSSES = "losses.json"


class LibraryError(EspalierError):
    """A replacement that is asked for and not there."""


class ReplacementMeta(Section):
    """What the manifest of a stored replacement says about it."""

    block: BlockPlan
    """What it replaces; its `start` says whether it was trained, or is cut from the teacher."""
    damage: NonNegativeFloat | None = None
    """Fidelity loss of the teacher with this one replacement in it; none after a failure."""
    loss: float | None = None
    """Training loss at the end: the mean of the last tenth of the steps."""
    failed: str | None = None
    """Why it was dropped; then no weights are stored, and it is not tried again."""
    ridged: tuple[str, ...] = ()
    """Linear maps whose closed-form fit was singular, and so ridged."""
    parameters: NonNegativeInt = 0
    """Of the replacement."""
    seconds: NonNegativeFloat = 0.0
    """Its share of its group's training time."""
    continued: tuple[NonNegativeInt, ...] = ()
    """Steps from whose checkpoints it went on, after its worker was lost or the run cut off."""
    setbacks: NonNegativeInt = 0
    """How often its rate was halved, after a step that was not finite or a spike."""
    training: TrainingConfig | None = None
    """How it was trained; None of one cut from the teacher."""


def replacement_prefix(
    teacher: str, block: BlockPlan, training: TrainingConfig, encoding: str, seed: int
) -> str:
    """Where a replacement lives: by teacher digest, span, variant and everything it is made by.

    `encoding` is the prefix of the latents that it is trained and measured on; `training` does not
    matter to one that is cut from the teacher.
    """
    made_from: dict[str, JsonValue] = {
        "block": block.model_dump(mode="json", exclude_defaults=True),
        "encoding": encoding,
        "seed": seed,
    }
    if block.start == "library":
        made_from["training"] = training.model_dump(mode="json")
    return layout.replacement(teacher, digest_json(made_from))


class Library:
    """Replacements. Call it with a trained one's block for its weights, as `assemble` does.

    Weights come from files on this machine that are memory-mapped, so that processes share them;
    they must not be changed in place.
    """

    def __init__(
        self, store: Store, prefixes: Mapping[BlockPlan, str], cache: Path | None = None
    ) -> None:
        self._store, self._cache = store, cache
        self._prefixes = dict(prefixes)
        self._meta: dict[BlockPlan, ReplacementMeta] = {}
        self._tensors: dict[BlockPlan, dict[str, Tensor]] = {}

    @property
    def blocks(self) -> tuple[BlockPlan, ...]:
        """All replacements that there are."""
        return tuple(self._prefixes)

    def __call__(self, block: BlockPlan) -> dict[str, Tensor]:
        """The weights of a replacement, named as in its block. LibraryError without one."""
        if block not in self._tensors:
            prefix = self._prefix(block)
            folder = local_copy(self._store, prefix, cache=self._cache)
            where = f"{self._store.url}/{prefix}/{TENSORS}"
            self._tensors[block] = load_tensors(folder / TENSORS, where)
        return self._tensors[block]

    def damage(self, block: BlockPlan) -> float:
        """Fidelity loss of the teacher with only this replacement; 0 for an untouched block."""
        if block.untouched:
            return 0.0
        damage = self.meta(block).damage
        assert damage is not None, block
        return damage

    def meta(self, block: BlockPlan) -> ReplacementMeta:
        """What is known of a replacement."""
        if block not in self._meta:
            prefix = self._prefix(block)
            meta = read_meta(self._store, prefix)
            if meta is None:
                raise LibraryError(
                    f"{self._store.url}/{prefix}: the replacement is no longer there; run "
                    "`espalier library` again"
                )
            self._meta[block] = meta
        return self._meta[block]

    def _prefix(self, block: BlockPlan) -> str:
        if block not in self._prefixes:
            raise LibraryError(
                f"{block}: not in the library; name it there and run `espalier library`"
            )
        return self._prefixes[block]


def read_meta(store: Store, prefix: str) -> ReplacementMeta | None:
    """What is stored about a replacement, or None when it is not there."""
    manifest = published(store, prefix)
    return None if manifest is None else ReplacementMeta.model_validate(manifest.meta)

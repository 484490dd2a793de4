"""Redundancy of a teacher's blocks: the record of it, and which replacements it nominates.

The measuring itself is in search/redundancy.py; nothing here needs torch until tensors are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from search.budget import Target
from search.solver import damages_through
from search.space import priced_space, started
from storage.errors import DamagedError
from storage.manifest import publish_once, published, read_bytes, read_json
from storage.section import Section
from storage.store import Store
from trainers.measure import Table
from trainers.students.families.base import Config
from trainers.students.plan import BlockPlan, Plan, Start

if TYPE_CHECKING:
    from torch import Tensor

FACTS = "analysis.json"
TENSORS = "analysis.safetensors"


class AnalyseConfig(Section):
    """How redundancy is measured, and how many replacements it may nominate."""

    pictures: PositiveInt = 16
    """Training pictures that the teacher is measured on, each once in every timestep band."""

    bands: PositiveInt = 4
    """Equal parts of the time from data to noise for which importance is given apart."""

    tokens: PositiveInt = 1024
    """Tokens of each stream, drawn once, on which states are compared (CKA)."""

    kernel: Literal["linear", "rbf"] = "linear"
    """Of CKA; `rbf` takes the median distance of the tokens as its width."""

    probe_steps: NonNegativeInt = 4
    """Steps that train the linear probes after their closed form (PPCL); they matter where a system
    was singular."""

    workers: PositiveInt = 1
    """Ray workers that share the pictures, as many at a time as pass through the teacher together;
    what they find does not depend on their number. Each holds the sums of all blocks in its
    machine's own memory, for Qwen-Image at least 35 GiB."""

    batch_size: PositiveInt = 64
    """Pictures that noise is drawn for together; what is drawn for each depends on it. They pass
    through the teacher a few at a time where they are large (trainers/passes.py)."""

    replacements: PositiveInt = 48
    """Replacements nominated for the library at most; those of the plans that a search starts from
    (search.rules) come first and count. One that is offered with several library.starts counts
    once: only `library` is trained."""


@dataclass(frozen=True)
class Analysis:
    """What was measured of a teacher of L blocks."""

    bands: tuple[str, ...]
    """Ranges of timesteps, noisiest first."""
    importance: Tensor
    """[L, bands]: mean squared change of the velocity when the block's residual is left out."""
    influence: Tensor
    """[L]: 1 − the mean cosine of tokens before and after the block (ShortGPT's Block Influence),
    mean of the two streams."""
    ffn_error: Tensor
    """[L]: what linear maps fitted in place of the FFNs leave, as a part of what constants would,
    mean over the streams; infinite where a block cannot have them."""
    image_cka: Tensor
    """[L, L]: CKA of the image stream's states after each pair of blocks."""
    text_cka: Tensor
    image_chain: Tensor
    """[L, max_span]: PPCL's c(u, u + j), the CKA between the image states after block u + j and
    those of the chain of linear probes from the state after block u; 1 in column 0, NaN past L."""
    text_chain: Tensor
    damages: dict[BlockPlan, float]
    """Estimated fidelity loss of each candidate replacement alone in the teacher; 0 for the
    teacher's own blocks."""
    ridged: int = 0
    """Probes and maps whose least-squares system was singular, and so ridged."""


def save_analysis(store: Store, prefix: str, analysis: Analysis) -> None:
    """Publish an analysis."""
    from storage.tensors import save_tensors

    damages = [
        [block.model_dump(mode="json", exclude_defaults=True), damage]
        for block, damage in analysis.damages.items()
    ]
    facts = {"bands": list(analysis.bands), "damages": damages, "ridged": analysis.ridged}
    tensors = {name: getattr(analysis, name).contiguous() for name in _TENSORS}
    files = {
        FACTS: json.dumps(facts, indent=1, allow_nan=False).encode(),
        TENSORS: save_tensors(tensors, {}),
    }
    publish_once(store, prefix, files)


def load_analysis(store: Store, prefix: str) -> Analysis | None:
    """The analysis published under a prefix, or None."""
    from storage.tensors import load_tensors

    manifest = published(store, prefix)
    if manifest is None:
        return None
    facts: Any = read_json(store, prefix, FACTS, manifest)
    where = f"{store.url}/{prefix}/{TENSORS}"
    tensors = load_tensors(read_bytes(store, prefix, TENSORS, manifest), where)
    if not set(_TENSORS) <= set(tensors):
        raise DamagedError(
            f"{where}: not a whole analysis; remove {prefix} from the store and run "
            "`espalier analyse` again"
        )
    return Analysis(
        bands=tuple(facts["bands"]),
        ridged=facts["ridged"],
        damages={BlockPlan.model_validate(block): damage for block, damage in facts["damages"]},
        **{name: tensors[name] for name in _TENSORS},
    )


def nominate(
    damages: dict[BlockPlan, float],
    family: str,
    config: Config,
    targets: Sequence[Target],
    most: int,
    plans: Sequence[Plan] = (),
    table: Table | None = None,
    starts: Sequence[Start] = ("library",),
) -> list[BlockPlan]:
    """The replacements that a library should hold for students within the budgets of `targets`.

    First what `plans` and the best plan of each budget need, however many that
    are, so that each budget can be met; then, up to `most`, those whose best plan comes closest to
    the best of all: a replacement's regret is the damage that a plan at least takes on by using it,
    relative to the best plan under the same budget, and its lowest over the budgets counts.

    What is chosen so is offered from each of `starts` that can make it, since the damages, which
    are of trained ones, do not tell them apart; all of them count as one.
    """
    offered = {block: damage for block, damage in damages.items() if started(block, starts)}
    whole = priced_space(family, config, offered, table)
    needed = [b for plan in plans for b in plan.blocks if not b.untouched]
    chosen = dict.fromkeys(b.model_copy(update={"start": "library"}) for b in needed)
    regrets: dict[BlockPlan, float] = {}
    for target in targets:
        space = whole.within(target.currency)
        for plan in space.exact(target.room):
            chosen |= dict.fromkeys(block for block in plan.blocks if not block.untouched)
        through = damages_through(space.pieces, space.teacher_blocks, space.outside, target.room)
        best = min(through.values())
        for block, damage in through.items():
            regret = (damage - best) / best if best > 0 else damage
            regrets[block] = min(regret, regrets.get(block, math.inf))
    for block in sorted(regrets, key=lambda b: (regrets[b], b.span, -b.kept, b.text)):
        if len(chosen) >= most:
            break
        if not block.untouched:
            chosen[block] = None
    return list(dict.fromkeys([*needed, *(b for c in chosen for b in started(c, starts))]))


_TENSORS = (
    "importance",
    "influence",
    "ffn_error",
    "image_cka",
    "text_cka",
    "image_chain",
    "text_chain",
)

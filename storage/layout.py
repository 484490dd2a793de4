"""Where everything lives under the storage root: one pure function for every prefix.

    encoded/DIGEST/                 latents and embeddings, by what they were encoded from
    costs/DIGEST/                   latency and memory of blocks, by device and teacher
    analysis/DIGEST/                importance, CKA, nominated spans
    probes/DIGEST/                  what fidelity is measured on, and the teacher's velocity there
    library/TEACHER/DIGEST/         one replacement, by span, variant and training; the
                                    checkpoints of each sweep that trains it, until it has
    sweeps/NAME/                    the record of a sweep, its stages, trials and recoveries
    studies/NAME.journal            a sweep's trials for optuna-dashboard; may be deleted
    models/BUDGET/NAME/             one published model, never changed; the registry ranks them
    best/BUDGET/                    a copy of the best of them
    registry/BUDGET/                one small object for every published model

Names that a person chooses are checked here, so that no name reaches another's prefix.
"""

from __future__ import annotations

import re

from storage.errors import StoreError

ROOTS = (
    "encoded", "costs", "analysis", "probes", "library", "sweeps", "studies", "models", "best",
    "registry",
)  # fmt: skip
"""The first part of every prefix; whatever else lies in a store is somebody else's."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def encoded(digest: str) -> str:
    """Latents and embeddings of one data configuration under one encoder."""
    return f"encoded/{_name(digest)}"


def costs(digest: str) -> str:
    """What the parts of one teacher's students take on one device."""
    return f"costs/{_name(digest)}"


def analysis(digest: str) -> str:
    """What one analysis configuration found in one teacher on one encoding."""
    return f"analysis/{_name(digest)}"


def probe(digest: str) -> str:
    """The batches that fidelity is measured on, by teacher, encoding, size and seed."""
    return f"probes/{_name(digest)}"


def replacement(teacher: str, digest: str) -> str:
    """One trained replacement; `digest` covers its span, its variant and its training."""
    return f"library/{_name(teacher)}/{_name(digest)}"


def library_checkpoints(replacement: str, sweep: str) -> str:
    """A sweep's checkpoints of a replacement in training, by its own prefix: whoever trains it for
    the sweep, in whichever group, finds them. Other sweeps may be at the same replacement."""
    return f"{replacement}/checkpoints/{_name(sweep)}"


def sweep(name: str) -> str:
    """Everything that belongs to one sweep alone."""
    return f"sweeps/{_name(name)}"


def leases(name: str) -> str:
    """Who is running a sweep now."""
    return f"{sweep(name)}/leases"


def stage(name: str, stage: str) -> str:
    """One finished stage of a sweep: its seconds, its cost, what it made."""
    return f"{sweep(name)}/stages/{_name(stage)}"


def attempt(name: str, stage: str) -> str:
    """A stage of a sweep that has begun and not come to its end: one object."""
    return f"{sweep(name)}/stages/{_name(stage)}/running.json"


def sweep_costs(name: str) -> str:
    """Which of the measured costs a sweep goes by."""
    return f"{sweep(name)}/costs"


def confirmed(name: str, digest: str) -> str:
    """What one student of a sweep took when it was measured whole."""
    return f"{sweep(name)}/confirmed/{_name(digest)}.json"


def search(name: str) -> str:
    """The trials of a sweep's search."""
    return f"{sweep(name)}/search"


def proposed(name: str, budget: str, finalist: str) -> str:
    """What was chosen for the schedules of one finalist, in order: one object."""
    return f"{sweep(name)}/proposed/{_name(budget)}/{_name(finalist)}.json"


def recovery(name: str, budget: str, trial: str) -> str:
    """One recovery of one finalist; `budget` is the budget's label."""
    return f"{sweep(name)}/recovery/{_name(budget)}/{_name(trial)}"


def measured(name: str, budget: str, trial: str, steps: int) -> str:
    """What one recovery was worth after so many steps, and its losses up to there."""
    return f"{recovery(name, budget, trial)}/after-{steps:06d}"


def checkpoint(name: str, budget: str, trial: str) -> str:
    """The checkpoints of one recovery, one `step-…` prefix each."""
    return f"{recovery(name, budget, trial)}/checkpoints"


def finalist(name: str, budget: str, trial: str) -> str:
    """The student that one recovery ended with: its tensors, plan and losses."""
    return f"{recovery(name, budget, trial)}/student"


def report(name: str) -> str:
    """The report page of a sweep and its pictures."""
    return f"{sweep(name)}/report"


def best(budget: str) -> str:
    """The best model of a budget: a copy of it."""
    return f"best/{_name(budget)}"


def model(budget: str, name: str) -> str:
    """One published diffusers model, which never changes."""
    return f"models/{_name(budget)}/{_name(name)}"


def registry() -> str:
    """Every published model's entry, all budgets."""
    return "registry"


def registered(budget: str) -> str:
    """The entries of one budget."""
    return f"registry/{_name(budget)}"


def _name(part: str) -> str:
    if not _NAME.fullmatch(part):
        raise StoreError(
            f"{part!r}: not a name for storage; use up to 100 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit"
        )
    return part

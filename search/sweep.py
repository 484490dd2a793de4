"""One sweep: its configuration, teacher and store, opened only when all three fit together.

Everything that can be wrong about them is found here, before any worker starts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from pydantic import JsonValue

from search.budget import check_reachable
from search.config import SweepConfig
from search.space import candidates, smallest_parameters
from storage import layout
from storage.digest import digest_json
from storage.errors import EspalierError
from storage.manifest import publish, published
from storage.section import Section
from storage.store import Store, open_store
from trainers.data.encode import encoding_digest
from trainers.students.counts import plan_parameters
from trainers.students.families.base import check_plan
from trainers.students.plan import BlockPlan, Plan, PlanError, identity_plan
from trainers.teacher import Teacher, open_teacher

CONFIG = "config.json"


class SweepError(EspalierError):
    """A sweep that cannot go on where and as it is configured."""


@dataclass(frozen=True)
class Sweep:
    """A sweep that has been checked. Its digests name what each stage makes, by what it makes it
    from: the teacher, the sections of the configuration that matter to it, and the seed."""

    config: SweepConfig
    store: Store
    teacher: Teacher

    @property
    def name(self) -> str:
        return self.config.name

    @cached_property
    def teacher_blocks(self) -> int:
        return self.teacher.family.blocks(self.teacher.config)

    @cached_property
    def teacher_parameters(self) -> int:
        """Of the teacher's transformer."""
        plan = identity_plan(self.teacher.family.name, self.teacher_blocks)
        return plan_parameters(plan, self.teacher.config)

    @cached_property
    def candidates(self) -> list[BlockPlan]:
        """Every block that a student of this configuration may have."""
        if self.config.plan is not None:
            return list(self.config.plan.blocks)
        library, teacher = self.config.library, self.teacher
        every = candidates(
            self.teacher_blocks,
            min(library.max_span, self.teacher_blocks),
            library.widths,
            library.texts,
        )
        return [b for b in every if teacher.family.refusal(teacher.config, b) is None]

    @property
    def limits(self) -> dict[str, int]:
        """The most parameters that each budget allows, by label."""
        return {b.label: b.limit(self.teacher_parameters) for b in self.config.budgets}

    @cached_property
    def encoded_digest(self) -> str:
        return encoding_digest(self.teacher, self.config.data, self.config.seed)

    @property
    def encoded_prefix(self) -> str:
        return layout.encoded(self.encoded_digest)

    @cached_property
    def analysis_digest(self) -> str:
        library = self.config.library
        return _digest(
            self.teacher.digest,
            self.encoded_digest,
            self.config.analyse.model_dump(mode="json", exclude={"replacements", "workers"}),
            {"widths": library.widths, "texts": library.texts, "max_span": library.max_span},
            self.config.plan,
            self.config.seed,
        )

    @property
    def analysis_prefix(self) -> str:
        return layout.analysis(self.analysis_digest)

    @cached_property
    def library_digest(self) -> str:
        return _digest(
            self.analysis_digest,
            self.config.library.training,
            {"replacements": self.config.analyse.replacements, "limits": self.limits},
            self.config.search.model_dump(
                include={"exact", "rules", "earlier", "noise_power", "least_cka", "next_interval"}
            ),
            self.config.seed,
        )

    @cached_property
    def search_digest(self) -> str:
        search = self.config.search.model_dump(mode="json", exclude={"study"})
        return _digest(self.library_digest, search, self.config.seed)

    @cached_property
    def recover_digest(self) -> str:
        return _digest(self.search_digest, self.config.recover, self.config.seed)

    @cached_property
    def publish_digest(self) -> str:
        return _digest(self.recover_digest, self.config.judge)

    def claim(self) -> None:
        """Records that this name belongs to this teacher; called before the first stage runs."""
        meta: dict[str, JsonValue] = {
            "teacher": self.teacher.digest,
            "teacher_name": self.teacher.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        held = published(self.store, layout.sweep(self.name))
        if held is not None:
            meta["created"] = held.meta.get("created", meta["created"])
        body = json.dumps(self.config.model_dump(mode="json"), indent=1).encode()
        publish(self.store, layout.sweep(self.name), {CONFIG: body}, meta)


def open_sweep(config: SweepConfig) -> Sweep:
    """The sweep that a configuration describes, with its teacher and store open and checked.

    Raises TeacherError (a missing or damaged file), FamilyError, StoreError, BudgetError (a budget
    below what any plan of the configuration reaches), and SweepError when the name or a budget's
    place in the storage belongs to another teacher.
    """
    teacher = open_teacher(config.teacher)
    store = open_store(config.storage, config.store)
    sweep = Sweep(config, store, teacher)
    family = teacher.family.name
    if config.plan is not None:
        _check_plan(config.plan, sweep)
    least = smallest_parameters(teacher.config, family, sweep.candidates)
    for budget in config.budgets:
        check_reachable(budget, sweep.teacher_parameters, least)
    _check_owner(sweep, layout.sweep(sweep.name), f"sweep {sweep.name}", "give it another name")
    for budget in config.budgets:
        prefix = layout.best(budget.label)
        _check_owner(sweep, prefix, f"{prefix} in {store.url}", "use another storage")
    return sweep


def _check_plan(plan: Plan, sweep: Sweep) -> None:
    asked = (plan.family, plan.teacher_blocks)
    found = (sweep.teacher.family.name, sweep.teacher_blocks)
    if asked != found:
        raise SweepError(
            f"plan: it is for a teacher of family {asked[0]} with {asked[1]} blocks, and "
            f"{sweep.teacher.name} is of family {found[0]} with {found[1]}; give the teacher that "
            "the plan was made for"
        )
    try:
        check_plan(sweep.teacher.family, sweep.teacher.config, plan)
    except PlanError as error:
        raise SweepError(f"plan: {error}") from error


def _check_owner(sweep: Sweep, prefix: str, what: str, remedy: str) -> None:
    manifest = published(sweep.store, prefix)
    owner = manifest.meta.get("teacher") if manifest else None
    if owner is not None and owner != sweep.teacher.digest:
        raise SweepError(
            f"{what} belongs to another teacher ({owner}); this one is {sweep.teacher.digest} "
            f"({sweep.teacher.name}): {remedy}, or remove {prefix} from the storage"
        )


def _digest(*parts: Any) -> str:
    return digest_json(
        [p.model_dump(mode="json") if isinstance(p, Section) else _plain(p) for p in parts]
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value

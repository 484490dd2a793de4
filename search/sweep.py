"""One sweep: its configuration, teacher and store, opened only when all three fit together.

Everything that can be wrong about them is found here, before any worker starts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from pydantic import JsonValue

from search.budget import Budget, Currency, Target, check_reachable
from search.config import SweepConfig
from search.space import candidates, priced_space
from storage import layout
from storage.digest import digest_json
from storage.errors import EspalierError
from storage.manifest import publish, published, read_json
from storage.registry import entries
from storage.section import Section
from storage.store import Store, open_store
from trainers.data.encode import encoding_digest
from trainers.measure import Table, variant
from trainers.schedule import NOTHING_REPLACED
from trainers.students.counts import plan_parameters
from trainers.students.families.base import check_plan
from trainers.students.plan import BlockPlan, Plan, PlanError, Start, identity_plan
from trainers.teacher import Teacher, open_teacher

CONFIG = "config.json"
TABLE = "table.json"


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
        return self._offered(self.config.library.starts)

    @cached_property
    def analysed(self) -> list[BlockPlan]:
        """The blocks whose damage the analysis estimates: it does not know their starts apart, so
        that each span, width and text is there once, as the library would train it."""
        if self.config.plan is not None:
            return self.candidates
        return self._offered(("library",))

    def _offered(self, starts: Sequence[Start]) -> list[BlockPlan]:
        library, teacher = self.config.library, self.teacher
        every = candidates(
            self.teacher_blocks,
            min(library.max_span, self.teacher_blocks),
            library.widths,
            library.texts,
            starts,
        )
        return [b for b in every if teacher.family.refusal(teacher.config, b) is None]

    @property
    def measured(self) -> bool:
        """Whether its table is there, or it needs none."""
        return not self.config.measured or self._table_prefix is not None

    @property
    def _table_prefix(self) -> str | None:
        pointer = published(self.store, layout.sweep_costs(self.name))
        if pointer is None or pointer.meta.get("measure") != self.measure_digest:
            return None
        return str(pointer.meta["table"])

    @cached_property
    def table(self) -> Table | None:
        """What was measured for this sweep; None when no budget or objective needs it.

        SweepError when it has yet to be measured.
        """
        if not self.config.measured:
            return None
        prefix = self._table_prefix
        if prefix is None:
            raise SweepError(
                "no latency or memory is measured for this configuration yet; run `espalier "
                "measure` first"
            )
        read = read_json(self.store, prefix, TABLE, published(self.store, prefix))
        return Table.model_validate(read)

    @property
    def targets(self) -> list[Target]:
        """The budgets, as limits in their own currency. SweepError while one must be measured."""
        return [self.target(budget) for budget in self.config.budgets]

    def target(self, budget: Budget) -> Target:
        """One budget as a limit; see `targets`."""
        margin = self.config.measure.margin if budget.currency == "latency" else 0.0
        limit = budget.limit(self.teacher_cost(budget.currency))
        return Target(budget.label, limit, budget.currency, margin)

    def teacher_cost(self, currency: Currency) -> int:
        """Of the whole teacher: what it was measured to take, or its parameters."""
        if currency == "parameters":
            return self.teacher_parameters
        assert self.table is not None
        teacher = self.table.teacher
        return teacher.latency if currency == "latency" else teacher.memory

    @property
    def variants(self) -> list[BlockPlan]:
        """Blocks of every shape that a plan of this sweep may have: the teacher's own, the
        candidates', and what PPCL's rule makes of them."""
        family, config = self.teacher.family, self.teacher.config
        own = [BlockPlan(span=(i, i)) for i in range(self.teacher_blocks)]
        narrow = [
            BlockPlan(span=(i, i), start="library", text=text, ffn=ffn)
            for i in range(1, self.teacher_blocks)
            for text in ("dual", "projected")
            for ffn in (1.0, "linear")
        ]
        offered = narrow if self.config.plan is None and "ppcl" in self.config.search.rules else []
        every = (b for b in (*self.candidates, *offered) if family.refusal(config, b) is None)
        return [*own, *every]

    def check_budget(self, budget: Budget) -> None:
        """BudgetError unless some plan meets a budget whose currency is known by now."""
        damages = dict.fromkeys(self.candidates, 0.0)
        table = None if budget.currency == "parameters" else self.table
        space = priced_space(self.teacher.family.name, self.teacher.config, damages, table)
        least = space.within(budget.currency).smallest
        margin = self.target(budget).margin
        # The least limit of which the margin leaves room for the smallest.
        check_reachable(budget, self.teacher_cost(budget.currency), math.ceil(least / (1 - margin)))

    @cached_property
    def encoded_digest(self) -> str:
        return encoding_digest(self.teacher, self.config.data, self.config.seed)

    @property
    def encoded_prefix(self) -> str:
        return layout.encoded(self.encoded_digest)

    @cached_property
    def measure_digest(self) -> str:
        """Names what is to be measured; the device that it is measured on names the table."""
        family, config = self.teacher.family, self.teacher.config
        return _digest(
            dict(config),
            self.encoded_digest,
            self.config.measure.model_dump(mode="json", exclude={"margin"}),
            sorted({variant(family, config, block) for block in self.variants}),
            self.config.accelerator,
        )

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
        starts = sorted({*self.config.library.starts})
        return _digest(
            self.analysis_digest,
            self.config.library.training,
            {"replacements": self.config.analyse.replacements, "limits": self._limits},
            self.config.search.model_dump(
                include={"exact", "rules", "earlier", "noise_power", "least_cka", "next_interval"}
            ),
            self.config.seed,
            # A library of trained replacements alone is named as before there were others.
            *([starts] if starts != ["library"] else []),
        )

    @property
    def _limits(self) -> dict[str, JsonValue]:
        """What the budgets come to: a number, or what the number will be measured by."""
        measured: list[JsonValue] = [self.measure_digest, self.config.measure.margin]
        return {
            b.label: b.limit(self.teacher_parameters) if b.currency == "parameters" else measured
            for b in self.config.budgets
        }

    @cached_property
    def search_digest(self) -> str:
        search = self.config.search.model_dump(mode="json", exclude={"study"})
        if search["objectives"] is None:
            search.pop("objectives")
        measured = [self.measure_digest] if self.config.measured else []
        return _digest(self.library_digest, search, self.config.seed, *measured)

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
    teacher = open_teacher(config.teacher, config.store)
    store = open_store(config.storage, config.store)
    sweep = Sweep(config, store, teacher)
    if config.plan is not None:
        _check_plan(config.plan, sweep)
    for budget in config.budgets:
        if budget.currency == "parameters":
            sweep.check_budget(budget)
    _check_owner(sweep, layout.sweep(sweep.name), f"sweep {sweep.name}", "give it another name")
    for budget in config.budgets:
        prefix = layout.best(budget.label)
        owners = {entry.teacher for entry in entries(store, budget.label)} - {teacher.digest}
        if owners:
            raise _owned(sweep, f"{prefix} in {store.url}", min(owners), "use another storage")
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
    phases = sweep.config.recover.space.phases
    if plan.untouched and any(phase.train == "replacements" for phase in phases):
        raise SweepError(f"recover.space.phases: {NOTHING_REPLACED}")


def _check_owner(sweep: Sweep, prefix: str, what: str, remedy: str) -> None:
    manifest = published(sweep.store, prefix)
    owner = manifest.meta.get("teacher") if manifest else None
    if owner is not None and owner != sweep.teacher.digest:
        raise _owned(sweep, what, str(owner), f"{remedy}, or remove {prefix} from the storage")


def _owned(sweep: Sweep, what: str, owner: str, remedy: str) -> SweepError:
    return SweepError(
        f"{what} belongs to another teacher ({owner}); this one is {sweep.teacher.digest} "
        f"({sweep.teacher.name}): {remedy}"
    )


def _digest(*parts: Any) -> str:
    return digest_json(
        [p.model_dump(mode="json") if isinstance(p, Section) else _plain(p) for p in parts]
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value

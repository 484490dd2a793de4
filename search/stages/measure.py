"""Between encoding and analysis, for budgets and objectives of latency or memory: what blocks take
on the device. Later stages confirm here what whole students take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median

from pydantic import JsonValue, ValidationError

from search.budget import CURRENCIES, WHOLE_UNITS, Currency, Target
from search.costs import plan_costs
from search.report import words
from search.stages.place import Site, place
from search.stages.stage import Outcome, Stage
from search.sweep import TABLE, Sweep, SweepError
from storage import layout
from storage.digest import digest_json
from storage.errors import MissingKey
from storage.manifest import publish, published
from trainers.measure import Cost, MeasureConfig, Table
from trainers.progress import Progress
from trainers.students.plan import BlockPlan, Plan
from trainers.teacher import Teacher

Student = tuple[Plan, str | None]
"""A plan, and where its student's weights lie; without, weights are drawn, which are as fast."""


def run(sweep: Sweep, progress: Progress) -> Outcome:
    place(
        sweep,
        _measure,
        progress,
        teacher=sweep.teacher,
        encoded=sweep.encoded_prefix,
        resolution=sweep.config.data.resolution,
        blocks=sweep.variants,
        settings=sweep.config.measure,
        digest=sweep.measure_digest,
        pointer=layout.sweep_costs(sweep.name),
    )
    table = sweep.table
    if table is None:
        return Outcome("no budget or objective is a latency or a memory", {})
    for budget in sweep.config.budgets:
        if budget.currency != "parameters":
            sweep.check_budget(budget)
    said = (
        f"{len(table.blocks)} kinds of blocks on {table.device}; the teacher takes "
        f"{table.teacher.latency / 1e3:.3g} ms and {words.memory(table.teacher.memory)}"
    )
    return Outcome(said, {"teacher": table.teacher.model_dump(mode="json")})


def _measure(
    site: Site,
    teacher: Teacher,
    encoded: str,
    resolution: int,
    blocks: Sequence[BlockPlan],
    settings: MeasureConfig,
    digest: str,
    pointer: str,
) -> None:
    from trainers.data.latents import open_latents
    from trainers.measure import device_name, measure_table, measuring_inputs

    prefix = layout.costs(digest_json([digest, device_name(site.device)]))
    if published(site.store, prefix) is None:
        model = teacher.transformer(device=site.device)
        each = next(model.parameters())
        latents = open_latents(site.store, encoded)
        inputs = measuring_inputs(latents, resolution, settings, each.device, each.dtype)
        table = measure_table(model, teacher.family, teacher.config, blocks, inputs, settings)
        publish(site.store, prefix, {TABLE: table.model_dump_json(indent=1).encode()})
    publish(site.store, pointer, {}, {"measure": digest, "table": prefix})


def confirm(sweep: Sweep, students: Sequence[Student], progress: Progress) -> list[Cost]:
    """What whole students take, measured beside the teacher and kept."""
    keys = [_key(sweep, student) for student in students]
    missing = [
        (plan.to_json(), weights, key)
        for (plan, weights), key in zip(students, keys, strict=True)
        if _read(sweep, key) is None
    ]
    if missing:
        place(
            sweep,
            _confirm,
            progress,
            teacher=sweep.teacher,
            encoded=sweep.encoded_prefix,
            resolution=sweep.config.data.resolution,
            settings=sweep.config.measure,
            table=sweep.table,
            students=missing,
        )
    found = [_read(sweep, key) for key in keys]
    return [cost for cost in found if cost is not None]


def confirmed(sweep: Sweep, student: Student) -> Cost | None:
    """What `confirm` measured of a student, if it has."""
    return _read(sweep, _key(sweep, student)) if sweep.config.measured else None


def _confirm(
    site: Site,
    teacher: Teacher,
    encoded: str,
    resolution: int,
    settings: MeasureConfig,
    table: Table,
    students: Sequence[tuple[str, str | None, str]],
) -> None:
    from trainers.data.latents import open_latents
    from trainers.measure import measure_beside, measuring_inputs, shaped_model, weight_bytes
    from trainers.worker import load_student

    family, whole = teacher.family, teacher.transformer(device=site.device)
    each = next(whole.parameters())
    latents = open_latents(site.store, encoded)
    inputs = measuring_inputs(latents, resolution, settings, each.device, each.dtype)
    for written, weights, key in students:
        plan, model = Plan.from_json(written), None  # the one before goes before the next comes
        if weights is None:
            model = shaped_model(family, teacher.config, plan, each)
        else:
            model = load_student(site.store, weights, teacher, site.device)[0].to(each.dtype)
        cost = measure_beside(
            partial(family.forward, whole),
            partial(family.forward, model),
            weight_bytes([model]),
            table,
            inputs,
            settings,
        )
        site.store.write(key, cost.model_dump_json().encode())


def meeting(
    sweep: Sweep, target: Target, students: Sequence[Student], count: int, progress: Progress
) -> list[int]:
    """The places of the first `count` students that meet a budget when they are measured whole.

    SweepError when there are students and none does.
    """
    if target.currency == "parameters":
        return list(range(min(count, len(students))))
    taken: list[int] = []
    met: list[int] = []
    for start in range(0, len(students), count):
        costs = confirm(sweep, students[start : start + count], progress)
        taken += [as_measured(cost)[target.currency] for cost in costs]
        met = [i for i, cost in enumerate(taken) if cost <= target.limit]
        if len(met) >= count:
            break
    if students and not met:
        raise SweepError(
            f"budget {target.label} allows {target.limit:,} {WHOLE_UNITS[target.currency]}, and "
            f"none of {len(students)} students meets that when it is measured whole, the closest "
            f"takes {min(taken):,}; ask for more, or leave more free with measure.margin"
        )
    return met[:count]


def ratios(sweep: Sweep, students: Sequence[Student]) -> dict[str, JsonValue]:
    """Predicted over measured, the median of those students that were measured whole."""
    family, config = sweep.teacher.family, sweep.teacher.config
    costs = [(plan, confirmed(sweep, (plan, weights))) for plan, weights in students]
    return median_ratios(
        [
            (plan_costs(plan, family, config, sweep.table), as_measured(cost))
            for plan, cost in costs
            if cost is not None
        ]
    )


def median_ratios(
    pairs: Sequence[tuple[Mapping[Currency, int], Mapping[Currency, int]]],
) -> dict[str, JsonValue]:
    """Of predicted and measured costs, by currency; none for what was not measured."""
    found: dict[str, JsonValue] = {}
    for currency in CURRENCIES:
        each = [p[currency] / m[currency] for p, m in pairs if currency in m]
        if each:
            found[currency] = round(median(each), 3)
    return found


def told(found: Mapping[str, JsonValue]) -> str:
    """The ratios, for the end of a stage's summary."""
    each = ", ".join(f"{name} {ratio}" for name, ratio in found.items())
    return f"; predicted over measured: {each}" if each else ""


def as_measured(cost: Cost) -> dict[Currency, int]:
    """By currency."""
    return {"memory": cost.memory, "latency": cost.latency}


def _key(sweep: Sweep, student: Student) -> str:
    plan, weights = student
    assert sweep.table is not None
    made_from: list[JsonValue] = [
        sweep.teacher.digest,
        plan.digest,
        weights,
        sweep.measure_digest,
        sweep.table.model_dump(mode="json"),
    ]
    return layout.confirmed(sweep.name, digest_json(made_from))


def _read(sweep: Sweep, key: str) -> Cost | None:
    try:
        with sweep.store.read(key) as stream:
            return Cost.model_validate_json(stream.read())
    except (MissingKey, ValidationError):  # what cannot be read is measured again
        return None


MEASURE = Stage(
    name="measure",
    digest=lambda sweep: sweep.measure_digest,
    run=run,
    wanted=lambda sweep: bool(sweep.config.measured),
    placed=lambda _: True,
)

"""Budgets of latency and memory in the stages that need no Ray: what came before is invented."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from search.budget import BudgetError
from search.config import SweepConfig
from search.costs import plan_costs
from search.recover import Recovery
from search.stages import require_earlier, run_stage, stage_named, stages_of
from search.stages.measure import confirm, meeting
from search.stages.recover import finalists
from search.stages.results import results, status
from search.stages.stage import Stage
from search.sweep import Sweep, SweepError, open_sweep
from search.trials import Trial, save_trials
from storage import layout
from storage.manifest import published
from tests.search.test_publish_stage import done, encode
from tests.trainers.small import load_transformer
from trainers.progress import silent
from trainers.students.plan import Plan, uniform_plan
from trainers.students.surgery import assemble
from trainers.worker import publish_student

MEASURE: Stage = stage_named("measure")


def make_sweep(tmp_path: Path, teacher: Path, *budgets: str, **changes: object) -> Sweep:
    config = {
        "name": "tiny", "teacher": str(teacher), "storage": str(tmp_path / "runs"),
        "budgets": list(budgets), "measure": {"warmup": 0, "repeats": 3, "margin": 0},
        "judge": {"task": "shapes", "per_family": 1, "steps": 2, "shown": 1},
        "workers": 1,  # judges in this process
    }  # fmt: skip
    sweep = open_sweep(SweepConfig.model_validate(config | changes))
    encode(sweep)
    return sweep


def uniform(blocks: int) -> Plan:
    return uniform_plan("qwen_image", 6, blocks)


def test_only_what_asks_for_it_is_measured(tmp_path: Path, tiny_pipeline: Path) -> None:
    plain = make_sweep(tmp_path, tiny_pipeline, "60%")
    assert MEASURE not in stages_of(plain)
    assert plain.table is None
    by_budget = make_sweep(tmp_path, tiny_pipeline, "60% memory")
    by_objective = make_sweep(
        tmp_path, tiny_pipeline, "60%", search={"objectives": ["fidelity_loss", "latency"]}
    )
    for sweep in (by_budget, by_objective):
        assert MEASURE in stages_of(sweep)
        with pytest.raises(SweepError, match="espalier measure"):
            _ = sweep.targets if sweep is by_budget else sweep.table
        assert status(sweep)["stages"][1]["stage"] == "measure"
    # The stages before it are those that they were.
    for name in ("encode", "analyse"):
        assert stage_named(name).digest(plain) == stage_named(name).digest(by_budget)
    library = stage_named("library")
    require_earlier([MEASURE, library], library, plain)
    with pytest.raises(SweepError, match="run `espalier measure` first"):
        require_earlier([MEASURE, library], library, by_budget)


def test_a_table_makes_budgets_limits_and_is_kept(tmp_path: Path, tiny_pipeline: Path) -> None:
    sweep = make_sweep(tmp_path, tiny_pipeline, "60% latency", "70% memory", "50%")
    said = run_stage(MEASURE, sweep, silent()).summary
    assert "the teacher takes" in said
    assert MEASURE.state(sweep) == "done"
    teacher = sweep.table.teacher if sweep.table else None
    assert teacher is not None
    limits = {target.label: target.limit for target in sweep.targets}
    assert limits == {
        "60pct-latency": int(0.6 * teacher.latency),
        "70pct-memory": int(0.7 * teacher.memory),
        "50pct": sweep.teacher_parameters // 2,
    }
    # Another sweep of this teacher on this machine measures nothing.
    other = make_sweep(tmp_path, tiny_pipeline, "60% latency", name="other")
    tables = list(sweep.store.keys("costs"))
    run_stage(MEASURE, other, silent())
    assert list(sweep.store.keys("costs")) == tables
    assert other.table == sweep.table
    # Measured otherwise, it is another table, and nothing after it is done any more.
    finer = make_sweep(tmp_path, tiny_pipeline, "60% latency", measure={"repeats": 4})
    assert not finer.measured
    for name in ("library", "search", "publish"):
        assert stage_named(name).digest(finer) != stage_named(name).digest(other)


@pytest.mark.parametrize(("budget", "unit"), [("2% latency", "µs"), ("1KiB", "bytes")])
def test_a_budget_nobody_can_meet_is_refused_once_it_is_measured(
    tmp_path: Path, tiny_pipeline: Path, budget: str, unit: str
) -> None:
    sweep = make_sweep(tmp_path, tiny_pipeline, budget)
    with pytest.raises(BudgetError, match=f"budget {budget} allows .* {unit}.* smallest reachable"):
        run_stage(MEASURE, sweep, silent())
    assert MEASURE.state(sweep) != "done"


def test_the_limit_that_is_named_as_the_smallest_can_be_met(
    tmp_path: Path, tiny_pipeline: Path
) -> None:
    sweep = make_sweep(tmp_path, tiny_pipeline, "2% latency", measure={"repeats": 3, "margin": 0.1})
    with pytest.raises(BudgetError) as refused:
        run_stage(MEASURE, sweep, silent())
    least = str(refused.value).split("student has ")[1].split(" ")[0].replace(",", "")
    again = make_sweep(tmp_path, tiny_pipeline, f"{least}us", measure={"repeats": 3, "margin": 0.1})
    run_stage(MEASURE, again, silent())


def test_what_misses_its_budget_when_measured_gives_way(
    tmp_path: Path, tiny_pipeline: Path
) -> None:
    sweep = make_sweep(tmp_path, tiny_pipeline, "70% memory")
    run_stage(MEASURE, sweep, silent())
    (target,) = sweep.targets
    plans = [uniform(6), uniform(3), uniform(5), uniform(2)]
    students = [(plan, None) for plan in plans]
    costs = [cost.memory for cost in confirm(sweep, students, silent())]
    assert [cost <= target.limit for cost in costs] == [False, True, False, True]
    assert meeting(sweep, target, students, 1, silent()) == [1]
    assert meeting(sweep, target, students, 3, silent()) == [1, 3]
    with pytest.raises(SweepError, match=f"closest takes {min(costs[0], costs[2]):,}"):
        meeting(sweep, target, [students[0], students[2]], 1, silent())
    for plan, cost in zip(plans, costs, strict=True):
        known = plan_costs(plan, sweep.teacher.family, sweep.teacher.config, sweep.table)
        assert known["memory"] == pytest.approx(cost, rel=0.01)


def test_finalists_meet_their_budget_as_whole_models(tmp_path: Path, tiny_pipeline: Path) -> None:
    sweep = make_sweep(tmp_path, tiny_pipeline, "70% memory")
    run_stage(MEASURE, sweep, silent())
    # By a prediction that was wrong, the whole teacher seems to fit.
    trials = [
        Trial(
            number=i, budget="70pct-memory", origin="tpe", plan=plan, parameters=1, damage=0.5,
            expected=None, costs={"memory": 1, "latency": 1}, fidelity_loss=loss,
            seconds=0.5,
        )
        for i, (plan, loss) in enumerate([(uniform(6), 0.0), (uniform(3), 0.5), (uniform(2), 0.7)])
    ]  # fmt: skip
    save_trials(sweep.store, layout.search(sweep.name), trials)
    chosen = finalists(sweep, silent())
    assert [(f.rank, f.plan, f.loss) for f in chosen] == [
        (0, uniform(3), 0.5), (1, uniform(2), 0.7),
    ]  # fmt: skip


def test_a_published_student_meets_its_budget_and_says_what_it_takes(
    tmp_path: Path, tiny_pipeline: Path
) -> None:
    sweep = make_sweep(tmp_path, tiny_pipeline, "70% memory")
    run_stage(MEASURE, sweep, silent())
    schedule = sweep.config.recover.space.schedule(sweep.config.recover.space.middle())
    teacher = load_transformer(tiny_pipeline)
    recoveries = []
    for name, plan, loss in (("large", uniform(6), 0.01), ("small", uniform(3), 0.25)):
        prefix = layout.finalist(sweep.name, "70pct-memory", name)
        weights = assemble(teacher, plan).state_dict()
        publish_student(sweep.store, prefix, plan, weights, sweep.teacher)
        recovery = Recovery(
            budget="70pct-memory", trial=name, student=prefix, finalist=0, plan=plan,
            schedule=schedule, loss_before=0.75, measured=(), fidelity_loss=loss, seconds=1.0,
            state="complete", failed=None,
        )  # fmt: skip
        recoveries.append(recovery.model_dump(mode="json"))
    done(sweep, "recover", {"recoveries": recoveries})
    said = run_stage(stage_named("publish"), sweep, silent())
    assert "predicted over measured: memory " in said.summary
    best = published(sweep.store, "best/70pct-memory")
    assert best is not None
    assert best.meta["plan"] == uniform(3).digest
    (student,) = results(sweep)["students"]
    (target,) = sweep.targets
    assert student["memory_bytes"] == best.meta["memory_bytes"] <= target.limit
    card = (tmp_path / "runs" / "best" / "70pct-memory" / "README.md").read_text()
    assert "peak memory of a forward pass" in card
    assert "latency of a forward pass" in card
    page = Path(run_stage(stage_named("report"), sweep, silent()).summary).read_text()
    assert "of peak memory" in page


@pytest.mark.parametrize(
    ("objectives", "said"),
    [
        (["fidelity_loss", "judge_score"], "judge_score is measured by no tier"),
        (["parameters", "latency"], "fidelity_loss is missing"),
        (["fidelity_loss", "latency", "latency"], "named twice"),
        (["fidelity_loss", "beauty"], "Input should be 'judge_score'"),
    ],
)
def test_objectives_that_no_tier_measures_are_refused(objectives: list[str], said: str) -> None:
    document = {"name": "a", "teacher": "b", "budgets": ["50%"], "search": {}}
    SweepConfig.model_validate(document)
    with pytest.raises(ValidationError) as refused:
        SweepConfig.model_validate({**document, "search": {"objectives": objectives}})
    assert said in str(refused.value)
    assert "objectives" in str(refused.value)

"""From recoveries to published models and the report, without Ray: what came before is invented."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from search.budget import Budget
from search.config import SweepConfig
from search.recover import Recovery
from search.stages import require_earlier, skip_stage, stage_named
from search.stages.record import StageRecord, write_record
from search.stages.recover import check_all_came_through, recoveries_of
from search.stages.results import results, status
from search.stages.stage import run_stage
from search.sweep import Sweep, SweepError, open_sweep
from search.trials import Trial, save_trials
from storage import layout, registry
from storage.garbage import discard, find_garbage
from storage.manifest import alike, publish, published, withdraw
from storage.store import Unfinished
from storage.tensors import save_tensors
from tests.trainers.small import load_transformer, small_latents
from trainers.data.latents import CAPTIONS, TENSORS, EncodedMeta, shard_prefix
from trainers.progress import silent
from trainers.students.plan import Plan, uniform_plan
from trainers.students.surgery import assemble
from trainers.worker import publish_student

LOSSES = {"first": 0.5, "second": 0.25, "broken": None}


@pytest.fixture
def sweep(tmp_path: Path, tiny_pipeline: Path) -> Sweep:
    config = SweepConfig.model_validate(
        {
            "name": "tiny",
            "teacher": str(tiny_pipeline),
            "storage": str(tmp_path / "runs"),
            "workers": 1,  # judges in this process
            "budgets": ["60%"],
            "judge": {"task": "shapes", "per_family": 1, "steps": 2, "shown": 3},
        }
    )
    sweep = open_sweep(config)
    encode(sweep)
    plan = uniform_plan(sweep.teacher.family.name, 6, 3)
    search(sweep, plan)
    recover(sweep, plan, load_transformer(tiny_pipeline))
    return sweep


def encode(sweep: Sweep) -> None:
    latents = small_latents()
    for number, shard in enumerate(latents.shards):
        tensors = {"latents": shard.latents, "embeds": shard.embeds, "mask": shard.mask}
        files = {TENSORS: save_tensors(tensors), CAPTIONS: json.dumps(shard.captions).encode()}
        publish(sweep.store, shard_prefix(sweep.encoded_prefix, number), files)
    meta = EncodedMeta(shards=len(latents.shards), pictures=20, held_out=4)
    publish(sweep.store, sweep.encoded_prefix, {}, meta.model_dump(mode="json"))


def search(sweep: Sweep, plan: Plan) -> None:
    trial = Trial(
        number=0, budget="60pct", origin="uniform", plan=plan, parameters=1, damage=0.5,
        expected=None, fidelity_loss=0.75, seconds=0.5,
    )  # fmt: skip
    save_trials(sweep.store, layout.search(sweep.name), [trial])
    done(sweep, "search", {})


def recover(sweep: Sweep, plan: Plan, teacher: object) -> None:
    schedule = sweep.config.recover.space.schedule(sweep.config.recover.space.middle())
    weights = assemble(teacher, plan).state_dict()  # type: ignore[arg-type]  # a module
    recoveries = []
    for name, loss in LOSSES.items():
        prefix = layout.finalist(sweep.name, "60pct", name)
        if loss is not None:
            publish_student(sweep.store, prefix, plan, weights, sweep.teacher)
        recovery = Recovery(
            budget="60pct", trial=name, student=prefix, finalist=0, plan=plan, schedule=schedule,
            loss_before=0.75, measured=(), fidelity_loss=loss, seconds=1.0,
            state="complete" if loss is not None else "failed",
            failed="not finite" if loss is None else None,
        )  # fmt: skip
        recoveries.append(recovery.model_dump(mode="json"))
    done(sweep, "recover", {"recoveries": recoveries})


def done(sweep: Sweep, stage: str, facts: dict) -> None:  # type: ignore[type-arg]  # JSON
    record = StageRecord(
        stage=stage, digest=stage_named(stage).digest(sweep), started=datetime.now(UTC),
        seconds=2.0, workers=2, summary="invented", facts=facts,
    )  # fmt: skip
    write_record(sweep.store, sweep.name, record)


def test_the_best_recovery_becomes_a_model_and_a_page(sweep: Sweep, tmp_path: Path) -> None:
    stage = stage_named("publish")
    run_stage(stage, sweep, silent())
    entry = registry.best(sweep.store, "60pct")
    assert entry is not None
    assert entry.model is not None
    assert entry.model.startswith("models/60pct/")
    best = published(sweep.store, layout.best("60pct"))
    assert best is not None
    assert alike(published(sweep.store, entry.model), best)
    assert {"model_index.json", "plan.json", "plan.png", "README.md", "espalier.json"} <= set(
        best.files
    )
    assert best.meta["student"] == "sweeps/tiny/recovery/60pct/second/student"
    assert entry.fidelity_loss == 0.25
    assert entry.judge_score is not None
    assert entry.judged > 0
    card = (tmp_path / "runs" / entry.model / "README.md").read_text()
    for words in ("## Judge scores", "counting", sweep.teacher.digest, "library_name: diffusers"):
        assert words in card
    assert "20 pictures (shapes)" in card  # which is all there are

    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline.from_pretrained(tmp_path / "runs" / entry.model)
    assert len(pipeline.transformer.transformer_blocks) == 3

    assert stage.state(sweep) == "done"
    assert skip_stage(stage, sweep).summary == "1 models published"
    said = run_stage(stage_named("report"), sweep, silent())
    page = Path(said.summary)
    assert page == tmp_path / "runs" / "sweeps" / "tiny" / "report" / "report.html"
    text = page.read_text()
    assert "60%" in text
    assert text.count("data:image/png;base64,") >= 6

    (student,) = results(sweep)["students"]
    assert student["fidelity_loss"] == 0.25
    assert student["url"] == str(tmp_path / "runs" / "best" / "60pct")
    found = status(sweep)
    assert found["registry"][0]["plan_digest"] == student["plan"]
    assert [s["state"] for s in found["stages"]][-2:] == ["done", "done"]
    assert len(found["best_trials"]) == 1
    # Those of another search are not this one's.
    other = sweep.config.model_copy(update={"budgets": (Budget.model_validate("60% latency"),)})
    assert status(Sweep(other, sweep.store, sweep.teacher))["best_trials"] == []


def test_what_somebody_removed_is_made_again(sweep: Sweep) -> None:
    recover, search = stage_named("recover"), stage_named("search")
    assert (recover.state(sweep), search.state(sweep)) == ("done", "done")
    withdraw(sweep.store, layout.finalist(sweep.name, "60pct", "first"))
    assert (recover.state(sweep), search.state(sweep)) == ("missing", "done")
    withdraw(sweep.store, layout.search(sweep.name))
    assert search.state(sweep) == "missing"


def test_a_budget_whose_recoveries_all_failed_leaves_the_others_alone(
    sweep: Sweep, tmp_path: Path
) -> None:
    both = sweep.config.model_copy(
        update={"budgets": (*sweep.config.budgets, Budget.model_validate("80%"))}
    )
    recoveries = recoveries_of(sweep)
    sweep = Sweep(both, sweep.store, sweep.teacher)
    search(sweep, recoveries[0].plan)
    failed = [
        r.model_copy(update={"budget": "80pct", "student": f"none/{r.trial}"})
        for r in recoveries
        if r.state == "failed"
    ]

    def recovered(*others: Recovery) -> None:
        facts = [r.model_dump(mode="json") for r in (*recoveries, *others)]
        done(sweep, "recover", {"recoveries": facts})

    recovered(*failed)
    publish, report = stage_named("publish"), stage_named("report")
    # It is tried again when the sweep is, and what there is can be published before.
    assert stage_named("recover").state(sweep) == "partial"
    require_earlier([stage_named("recover"), publish], publish, sweep)
    record = run_stage(publish, sweep, silent())
    assert record.facts["students"].keys() == {"60pct"}
    run_stage(report, sweep, silent())
    assert (tmp_path / "runs" / "sweeps" / "tiny" / "report" / "report.html").is_file()
    with pytest.raises(SweepError, match="budget 80pct: every recovery failed, not finite"):
        check_all_came_through(sweep)

    recovered(recoveries[0].model_copy(update={"budget": "80pct"}))
    assert stage_named("recover").state(sweep) == "done"
    check_all_came_through(sweep)
    assert {publish.state(sweep), report.state(sweep)} == {"missing"}


def test_a_recovery_that_broke_off_is_tried_again_and_may_still_be_published(sweep: Sweep) -> None:
    recover, publish, report = (stage_named(name) for name in ("recover", "publish", "report"))
    recoveries = recoveries_of(sweep)

    def recovered(*found: Recovery) -> None:
        done(sweep, "recover", {"recoveries": [r.model_dump(mode="json") for r in found]})

    assert recover.state(sweep) == "done"
    run_stage(publish, sweep, silent())
    broken = recoveries[-1].model_copy(update={"broke": True})
    recovered(*recoveries[:-1], broken)
    assert recover.state(sweep) == "partial"
    require_earlier([recover, publish], publish, sweep)
    run_stage(publish, sweep, silent())
    run_stage(report, sweep, silent())
    recovered(*recoveries[:-1], broken)  # once more in vain
    assert (publish.state(sweep), report.state(sweep)) == ("done", "done")
    recovered(*recoveries)
    assert recover.state(sweep) == "done"
    assert {publish.state(sweep), report.state(sweep)} == {"missing"}


def test_what_a_killed_publication_left_of_its_model_is_cleared_away(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    discarded: list[str] = []
    left = Unfinished("w", "1", 0.0)
    monkeypatch.setattr(
        sweep.store, "unfinished", lambda prefix: [left._replace(key=f"{prefix}/w")]
    )
    monkeypatch.setattr(sweep.store, "discard", lambda write: discarded.append(write.key))
    run_stage(stage_named("publish"), sweep, silent())
    entry = registry.best(sweep.store, "60pct")
    assert entry is not None
    assert discarded == [f"{entry.model}/w"]


def test_a_student_that_was_passed_over_may_go(sweep: Sweep) -> None:
    recover, publish_stage = stage_named("recover"), stage_named("publish")
    students = {name: layout.finalist(sweep.name, "60pct", name) for name in LOSSES}
    run_stage(publish_stage, sweep, silent())
    entry = registry.best(sweep.store, "60pct")
    assert entry is not None
    (garbage,) = find_garbage(sweep.store, 0, students=True)
    assert garbage.prefix in {students["first"], students["second"]} - {entry.prefix}
    discard(sweep.store, garbage)
    assert recover.state(sweep) == publish_stage.state(sweep) == "done"
    # Another judge chooses among what is left.
    judge = sweep.config.judge.model_copy(update={"steps": 3, "finalists": 2})
    other = open_sweep(sweep.config.model_copy(update={"judge": judge}))
    assert publish_stage.state(other) == "missing"
    require_earlier([recover, publish_stage], publish_stage, other)
    run_stage(publish_stage, other, silent())
    found = registry.best(sweep.store, "60pct")
    assert found is not None
    assert found.prefix == entry.prefix
    # What was published is still missed.
    withdraw(sweep.store, entry.prefix)
    assert recover.state(other) != "done"


def test_publishing_again_adds_nothing(sweep: Sweep) -> None:
    def there() -> list[tuple[str, int]]:
        return [(body.key, body.size) for body in sweep.store.listing("")]

    stage = stage_named("publish")
    run_stage(stage, sweep, silent())
    before = [
        (key, size) for key, size in there() if key.startswith(("best/", "models/", "registry/"))
    ]
    run_stage(stage, sweep, silent())
    assert [(k, s) for k, s in there() if k.startswith(("best/", "models/", "registry/"))] == before


def test_only_the_best_models_stay_when_asked(sweep: Sweep) -> None:
    for number, loss in enumerate((0.5, 0.1)):
        entry = registry.Entry(
            budget="60pct", plan_digest=f"{number}", teacher=sweep.teacher.digest, sweep="earlier",
            prefix=f"students/{number}", model=f"models/60pct/{number}", parameters=1,
            fidelity_loss=loss, judge_score=loss,
        )  # fmt: skip
        publish(sweep.store, f"models/60pct/{number}", {"model_index.json": b"{}"})
        registry.add(sweep.store, entry)
    one = Sweep(sweep.config.model_copy(update={"keep_models": 1}), sweep.store, sweep.teacher)
    run_stage(stage_named("publish"), one, silent())
    left = registry.entries(sweep.store, "60pct")
    (told,) = results(one)["students"]
    # The best one, and what this sweep tells of, which is no better.
    assert [entry.plan_digest for entry in left] == ["0", told["plan"]]
    there = {entry.model.split("/")[2] for entry in left if entry.model}
    assert there == {"0", told["url"].rpartition("/")[2]}
    assert told["url"] == f"{sweep.store.url}/models/60pct/{max(there)}"  # best/60pct shows another
    assert {key.split("/")[2] for key in sweep.store.keys("models")} == there


def test_models_and_pages_that_were_removed_are_made_again(sweep: Sweep) -> None:
    stages = [stage_named("publish"), stage_named("report")]
    for stage in stages:
        run_stage(stage, sweep, silent())
    models = sweep_models(sweep)
    for gone in (layout.best("60pct"), layout.report(sweep.name), *models):
        withdraw(sweep.store, gone)
    assert [stage.state(sweep) for stage in stages] == ["missing", "missing"]
    for stage in stages:
        run_stage(stage, sweep, silent())
        assert stage.state(sweep) == "done"
    assert sweep_models(sweep) == models
    assert all(published(sweep.store, prefix) for prefix in models)


def sweep_models(sweep: Sweep) -> set[str]:
    return {entry.model for entry in registry.entries(sweep.store, "60pct") if entry.model}

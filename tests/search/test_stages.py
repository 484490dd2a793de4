"""What running, skipping and resuming a stage means; the stages' own work is tested elsewhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from search.config import SweepConfig
from search.stages import STAGES, require_earlier, run_stage, skip_stage, stage_named
from search.stages.library import _check_reachable, earlier_plans
from search.stages.place import Site, place
from search.stages.record import Stopwatch, read_attempt, read_record, write_record
from search.stages.stage import Outcome, Stage
from search.sweep import Sweep, SweepError, open_sweep
from storage import layout
from storage.errors import StoreError
from storage.manifest import publish, withdraw
from storage.registry import Entry, add, entries, remove
from trainers.data.shards import EncodedMeta, shard_prefix
from trainers.library.library import ReplacementMeta, replacement_prefix
from trainers.library.workers import LibraryReport
from trainers.progress import Progress, silent
from trainers.students.counts import plan_parameters
from trainers.students.plan import BlockPlan, Plan
from trainers.worker import PLAN, stored_plan

LIMITS = {"name": "tiny", "budgets": ["60%"]}


@pytest.fixture
def sweep(tmp_path: Path, tiny_pipeline: Path) -> Sweep:
    config = SweepConfig.model_validate(
        {**LIMITS, "teacher": str(tiny_pipeline), "storage": str(tmp_path / "runs")}
    )
    return open_sweep(config)


def changed(sweep: Sweep, **changes: object) -> Sweep:
    document = sweep.config.model_dump(mode="json") | changes
    return open_sweep(SweepConfig.model_validate(document))


def stage_that(run: object = None, name: str = "work", shared: bool = False) -> Stage:
    def nothing(sweep: Sweep, progress: Progress) -> Outcome:
        return Outcome("done", {"made": 3})

    return Stage(
        name=name,
        digest=lambda sweep: sweep.encoded_digest,
        run=run or nothing,  # type: ignore[arg-type]  # a Callable, checked by its use
        shared=(lambda sweep: "shared/thing") if shared else None,
    )


def leave_its_process(site: Site) -> None:
    import ray

    site.store.write("process", str(os.getpid()).encode())
    given = ray.get_runtime_context().get_assigned_resources()
    site.store.write("memory", str(int(given.get("memory", 0))).encode())


def test_work_on_a_gpu_has_its_memory_and_leaves_no_process_that_holds_it(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    on_gpu = changed(sweep, accelerator="gpu")
    # Workers find this module by its path.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    ray.init("local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        place(on_gpu, leave_its_process, silent(), memory=10 * 2**20)
        with on_gpu.store.read("memory") as stream:
            assert int(stream.read()) == 10 * 2**20
        with on_gpu.store.read("process") as stream:
            process = int(stream.read())
        assert process != os.getpid()
        with suppress(psutil.NoSuchProcess):
            psutil.Process(process).wait(60)
    finally:
        ray.shutdown()


def test_a_stage_is_done_once_it_has_run(sweep: Sweep) -> None:
    stage = stage_that()
    assert stage.state(sweep) == "missing"
    record = run_stage(stage, sweep, silent())
    assert stage.state(sweep) == "done"
    assert skip_stage(stage, sweep) == record
    assert record.facts == {"made": 3}
    assert record.workers == sweep.config.workers


def test_another_input_is_another_stage(sweep: Sweep) -> None:
    stage = stage_that()
    run_stage(stage, sweep, silent())
    assert stage.state(changed(sweep, seed=1)) == "missing"
    assert stage.state(changed(sweep, budgets=["90%"])) == "done"


def test_a_stage_that_was_cut_off_keeps_its_time(sweep: Sweep) -> None:
    def breaks(sweep: Sweep, progress: Progress) -> Outcome:
        progress.update(2, 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(stage_that(breaks), sweep, silent())
    assert stage_that().state(sweep) == "partial"
    attempt = read_attempt(sweep.store, sweep.name, "work")
    assert attempt is not None
    assert (attempt.done, attempt.total) == (2, 5)
    record = run_stage(stage_that(), sweep, silent())
    assert record.started == attempt.started
    assert record.seconds >= attempt.seconds
    assert read_attempt(sweep.store, sweep.name, "work") is None


def test_what_another_sweep_made_is_reused(sweep: Sweep) -> None:
    stage = stage_that(shared=True)
    publish(sweep.store, "shared/thing", {})
    assert stage.state(sweep) == "done"
    assert skip_stage(stage, sweep).reused
    assert read_record(sweep.store, sweep.name, "work") is not None


def test_output_without_a_record_is_not_reuse_when_we_made_it(sweep: Sweep) -> None:
    def killed_at_the_end(sweep: Sweep, progress: Progress) -> Outcome:
        publish(sweep.store, "shared/thing", {})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(
            Stage(
                "work",
                lambda sweep: sweep.encoded_digest,
                killed_at_the_end,
                lambda sweep: "shared/thing",
            ),
            sweep,
            silent(),
        )
    assert not skip_stage(stage_that(shared=True), sweep).reused


def test_a_stage_needs_those_before_it(sweep: Sweep) -> None:
    first, second = stage_that(name="first"), stage_that(name="second")
    with pytest.raises(SweepError, match="needs the output of `first`"):
        require_earlier([first, second], second, sweep)
    run_stage(first, sweep, silent())
    require_earlier([first, second], second, sweep)


def test_time_counts_on_when_a_part_of_the_output_is_made_again(sweep: Sweep) -> None:
    stage = replace(stage_that(), parts=lambda _: ["work/part"])
    publish(sweep.store, "work/part", {})
    first = run_stage(stage, sweep, silent())
    write_record(sweep.store, sweep.name, first.model_copy(update={"seconds": 60.0}))
    assert stage.state(sweep) == "done"
    withdraw(sweep.store, "work/part")
    assert stage.state(sweep) == "missing"
    again = run_stage(stage, sweep, silent())
    assert again.started == first.started
    assert again.seconds >= 60


def test_an_encoding_without_one_of_its_shards_is_not_done(sweep: Sweep) -> None:
    encode, shards = stage_named("encode"), [shard_prefix(sweep.encoded_prefix, n) for n in (0, 1)]
    for shard in shards:
        publish(sweep.store, shard, {})
    meta = EncodedMeta(shards=2, pictures=8, held_out=2)
    publish(sweep.store, sweep.encoded_prefix, {}, meta.model_dump(mode="json"))
    assert encode.state(sweep) == "done"
    withdraw(sweep.store, shards[1])
    assert encode.state(sweep) == "missing"


def test_a_library_without_one_of_its_replacements_is_made_again_for_the_same_plans(
    sweep: Sweep,
) -> None:
    plan = published_plan(sweep, "other", (0, 1), (2, 3), (4, 5))
    sweep, library = changed(sweep, plan=plan.model_dump(mode="json")), stage_named("library")

    def put(block: BlockPlan) -> str:
        training, seed = sweep.config.library.training, sweep.config.seed
        prefix = replacement_prefix(
            sweep.teacher.digest, block, training, sweep.encoded_prefix, seed
        )
        meta = ReplacementMeta(block=block, damage=0.5)
        publish(sweep.store, prefix, {}, meta.model_dump(mode="json"))
        return prefix

    prefixes = [put(block) for block in plan.blocks]
    first = run_stage(library, sweep, silent())
    started_from = [["60pct", plan.model_dump(mode="json")]]
    facts = {**first.facts, "earlier": started_from}
    write_record(sweep.store, sweep.name, first.model_copy(update={"facts": facts}))
    assert library.state(sweep) == "done"
    withdraw(sweep.store, prefixes[1])
    assert library.state(sweep) == "missing"
    with pytest.raises(SweepError, match="run `espalier library` first"):
        require_earlier([library, stage_named("search")], stage_named("search"), sweep)

    put(plan.blocks[1])
    again = run_stage(library, sweep, silent())
    assert library.state(sweep) == "done"
    assert again.facts["earlier"] == started_from


def test_starts_change_no_analysis_but_the_library(sweep: Sweep) -> None:
    def offering(*starts: str) -> Sweep:
        return changed(sweep, library={"starts": starts})

    both = offering("library", "average")
    for name in ("encode", "analyse"):
        assert stage_named(name).digest(sweep) == stage_named(name).digest(both)
    for name in ("library", "search", "recover"):
        assert stage_named(name).digest(sweep) != stage_named(name).digest(both)
    assert both.library_digest == offering("average", "library", "average").library_digest
    assert both.analysed == sweep.analysed == sweep.candidates
    assert {block.start for block in both.candidates} == {"library", "first", "average"}
    assert {*sweep.candidates} < {*both.candidates}


def test_a_budget_changes_no_analysis_but_what_is_searched(sweep: Sweep) -> None:
    other = changed(sweep, budgets=["90%"])
    for name in ("encode", "analyse"):
        assert stage_named(name).digest(sweep) == stage_named(name).digest(other)
    for name in ("library", "search", "recover", "publish", "report"):
        assert stage_named(name).digest(sweep) != stage_named(name).digest(other)


def test_how_work_is_spread_changes_no_digest(sweep: Sweep) -> None:
    other = changed(sweep, workers=7, name="renamed")
    for stage in STAGES:
        assert stage.digest(sweep) == stage.digest(other)


def test_a_name_that_belongs_to_another_teacher_is_refused(sweep: Sweep) -> None:
    sweep.claim()
    publish(sweep.store, layout.sweep("taken"), {}, {"teacher": "0123456789abcdef"})
    with pytest.raises(SweepError) as caught:
        changed(sweep, name="taken")
    assert "0123456789abcdef" in str(caught.value)
    assert sweep.teacher.digest in str(caught.value)
    assert changed(sweep).name == sweep.name


def test_a_budget_that_belongs_to_another_teacher_is_refused(sweep: Sweep) -> None:
    entry = Entry(
        budget="60pct", plan_digest="p", teacher="0123456789abcdef", sweep="other", prefix="s",
        parameters=1, fidelity_loss=0.1,
    )  # fmt: skip
    add(sweep.store, entry)
    with pytest.raises(SweepError, match=r"best/60pct .* belongs to another teacher"):
        changed(sweep)


def published_plan(sweep: Sweep, by: str, *spans: tuple[int, int], score: float = 0.5) -> Plan:
    """A plan in the registry, as a sweep named `by` would have left it."""
    plan = Plan(
        family="qwen_image",
        teacher_blocks=6,
        blocks=tuple(BlockPlan(span=span, start="library") for span in spans),
    )
    prefix = layout.finalist(by, "any", plan.digest)
    publish(sweep.store, prefix, {PLAN: plan.to_json().encode()})
    entry = Entry(
        budget="any", plan_digest=plan.digest, teacher=sweep.teacher.digest, sweep=by,
        prefix=prefix, parameters=plan_parameters(plan, sweep.teacher.config), fidelity_loss=0.1,
        judge_score=score,
    )  # fmt: skip
    add(sweep.store, entry)
    return plan


def test_a_sweep_starts_from_the_best_that_others_found(sweep: Sweep) -> None:
    good = published_plan(sweep, "other", (0, 1), (2, 3), (4, 5), score=0.8)
    fair = published_plan(sweep, "other", (0, 2), (3, 5), score=0.7)
    published_plan(sweep, sweep.name, (0, 3), (4, 5), score=0.9)  # its own
    published_plan(sweep, "other", *((i, i) for i in range(6)), score=0.95)  # too large
    published_plan(sweep, "other", (0, 5), score=0.99)  # a longer span than library.max_span
    assert sweep.config.library.max_span < 6
    assert earlier_plans(sweep) == [("60pct", "earlier", good)]
    two = changed(sweep, search={"earlier": 2})
    assert earlier_plans(two) == [("60pct", "earlier", good), ("60pct", "earlier", fair)]
    assert earlier_plans(changed(sweep, search={"earlier": 0})) == []


def test_plans_of_another_teacher_are_no_start(sweep: Sweep) -> None:
    plan = published_plan(sweep, "other", (0, 1), (2, 3), (4, 5))
    (entry,) = entries(sweep.store)
    remove(sweep.store, entry)
    add(sweep.store, entry.model_copy(update={"teacher": "0123456789abcdef"}))
    assert earlier_plans(sweep) == []
    assert stored_plan(sweep.store, entry.prefix) == plan


def test_a_store_that_is_out_does_not_hide_what_a_stage_ended_with(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out(self: object) -> None:
        raise StoreError("the store does not answer")

    def interrupted(sweep: Sweep, progress: Progress) -> Outcome:
        monkeypatch.setattr(Stopwatch, "save", out)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(stage_that(interrupted), sweep, silent())


def test_how_far_a_stage_was_is_kept_with_what_it_had_found(sweep: Sweep) -> None:
    def cut_off(sweep: Sweep, progress: Progress) -> Outcome:
        progress.update(3, 8, loss=float("nan"), **{"50pct": 0.25})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(stage_that(cut_off), sweep, silent())
    attempt = read_attempt(sweep.store, sweep.name, "work")
    assert attempt is not None
    assert (attempt.done, attempt.total, attempt.facts) == (3, 8, {"50pct": 0.25})


@pytest.mark.parametrize("failed", [[], [1], [0], range(5)])
def test_a_library_that_lost_too_much_says_so(sweep: Sweep, failed: Sequence[int]) -> None:
    """60% of six blocks are three spans of two: without the first there are but two."""
    blocks = [BlockPlan(span=(i, i + 1), start="library") for i in range(5)]
    prefixes = {block: f"library/{n}" for n, block in enumerate(blocks)}
    for prefix, block in [(prefixes[block], block) for block in blocks]:
        meta = ReplacementMeta(block=block, damage=0.5)
        publish(sweep.store, prefix, {}, meta.model_dump(mode="json"))
    lost = dict.fromkeys([blocks[i] for i in failed], "its loss was not finite")
    report = LibraryReport(
        prefixes={b: p for b, p in prefixes.items() if b not in lost},
        trained=5, measured=0, reused=0, failed=lost, ridged=(), interruptions=(),
    )  # fmt: skip
    said = rf"{len(lost)} of 5 .*not finite.*budget 60pct; .*library.lr"
    with nullcontext() if 0 not in failed else pytest.raises(SweepError, match=said):
        _check_reachable(sweep, report)

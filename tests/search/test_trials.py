"""A whole search over the tiny teacher on Ray: scored, stored, resumed; bad scores survived."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import optuna
import pytest
import torch

from search.budget import Target
from search.score import Bench, Measuring, Score, Scorer
from search.space import Space
from search.studies import StudyLog, open_storage
from search.trials import (
    SearchConfig,
    SearchError,
    Trial,
    agreement,
    best_trials,
    library_space,
    load_trials,
    pareto_trials,
    run_search,
)
from storage.errors import StoreError
from storage.manifest import publish
from storage.store import Store, open_store
from storage.tensors import save_tensors
from trainers.data.latents import open_latents
from trainers.data.shards import EncodedMeta, shard_prefix
from trainers.evaluate import fidelity_loss
from trainers.library.library import TENSORS, Library, ReplacementMeta
from trainers.measure import MeasureConfig, measure_table, measuring_inputs, weight_bytes
from trainers.probe import ProbeConfig, make_probe
from trainers.students.plan import BlockPlan, Plan
from trainers.students.surgery import assemble, make_block
from trainers.teacher import Teacher

CONFIG = SearchConfig(trials=10, exact=2, lag=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """An encoding of random latents in two shards."""
    store = open_store(str(tmp_path_factory.mktemp("store")))
    generator = torch.Generator().manual_seed(0)
    for number in range(2):
        tensors = {
            "latents": torch.randn(4, 16, 8, 8, generator=generator),
            "embeds": torch.randn(4, 5, 64, generator=generator),
            "mask": torch.ones(4, 5, dtype=torch.bool),
        }
        captions = json.dumps(["a circle"] * 4).encode()
        files = {"tensors.safetensors": save_tensors(tensors), "captions.json": captions}
        publish(store, shard_prefix("encoded/x", number), files)
    meta = EncodedMeta(shards=2, pictures=8, held_out=3)
    publish(store, "encoded/x", {}, meta.model_dump(mode="json"))
    return store


@pytest.fixture(scope="module")
def bench(teacher: Teacher, store: Store, monkeypatch_module: pytest.MonkeyPatch) -> Bench:
    """A library of untrained replacements."""
    model = teacher.transformer()
    blocks = list(teacher.family.block_modules(model))
    made = []
    spans = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (0, 2), (3, 5)]
    for number, span in enumerate(spans):
        block = BlockPlan(span=span, start="library", ffn=0.5 if number == 2 else 1.0)
        started = block.model_copy(update={"start": "average"})
        module = make_block(teacher.family, teacher.config, blocks, started)
        meta = ReplacementMeta(block=block, damage=0.1 * (number + 1))
        files = {TENSORS: save_tensors(module.state_dict())}
        publish(store, f"library/t/{number}", files, meta.model_dump(mode="json"))
        made.append((block, f"library/t/{number}"))
    return Bench(
        teacher=teacher,
        url=store.url,
        encoding="encoded/x",
        replacements=tuple(made),
        scores="sweeps/one/scores",
        probe=ProbeConfig(pictures=3, timesteps=2),
        threads=1,
    )


@pytest.fixture(scope="module")
def monkeypatch_module(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[pytest.MonkeyPatch]:
    """Local copies of stored files go to a folder of this test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield patch


@pytest.fixture(scope="module")
def space(teacher: Teacher, store: Store, bench: Bench) -> Space:
    return library_space(teacher, Library(store, dict(bench.replacements)))


@pytest.fixture(scope="module")
def targets(space: Space) -> list[Target]:
    own = space.pieces[BlockPlan(span=(0, 0))].cost
    return [Target("small", space.outside + 3 * own), Target("large", space.outside + 4 * own)]


@pytest.fixture(scope="module")
def trials(
    ray: None, space: Space, targets: list[Target], bench: Bench, store: Store
) -> list[Trial]:
    return run_search(space, targets, bench, CONFIG, store, "sweeps/one/search", cpus=1.0)


def test_scores_what_the_assembled_student_has(
    trials: list[Trial], teacher: Teacher, store: Store, bench: Bench
) -> None:
    model = teacher.transformer()
    probe = make_probe(model, teacher.family, open_latents(store, "encoded/x"), bench.probe, 0)
    library = Library(store, dict(bench.replacements))
    for trial in trials[:3]:
        student = assemble(model, trial.plan, library)
        assert sum(p.numel() for p in student.parameters()) == trial.parameters
        loss = fidelity_loss(student, teacher.family, probe)
        assert trial.fidelity_loss == pytest.approx(loss, rel=1e-4)


def test_a_given_plan_may_have_blocks_that_no_library_trains(
    teacher: Teacher, store: Store, bench: Bench
) -> None:
    plan = Plan(
        family="qwen_image",
        teacher_blocks=6,
        blocks=(
            BlockPlan(span=(0, 1), start="library"),
            BlockPlan(span=(2, 3), start="average"),
            BlockPlan(span=(4, 4), ffn=0.5),
            BlockPlan(span=(5, 5), text="projected"),
        ),
    )
    model = teacher.transformer()
    probe = make_probe(model, teacher.family, open_latents(store, "encoded/x"), bench.probe, 0)
    student = assemble(model, plan, Library(store, dict(bench.replacements)))
    expected = fidelity_loss(student, teacher.family, probe)
    assert bench.open().score(plan).fidelity_loss == pytest.approx(expected, rel=1e-4)


def test_plans_may_mix_trained_and_untrained_replacements(
    ray: None, teacher: Teacher, store: Store, bench: Bench
) -> None:
    cut = []
    for number, (block, _) in enumerate(bench.replacements):
        untrained = block.model_copy(update={"start": "average" if number % 2 else "first"})
        meta = ReplacementMeta(block=untrained, damage=0.1 * (8 - number))
        publish(store, f"library/t/cut-{number}", {}, meta.model_dump(mode="json"))
        cut.append((untrained, f"library/t/cut-{number}"))
    both = replace(bench, replacements=(*bench.replacements, *cut), scores="sweeps/both/scores")
    library = Library(store, dict(both.replacements))
    space = library_space(teacher, library)
    own = space.pieces[BlockPlan(span=(0, 0))].cost
    target = Target("small", space.outside + 4 * own)
    trials = run_search(space, [target], both, CONFIG, store, "sweeps/both/search", cpus=1.0)

    assert len(trials) == CONFIG.trials
    assert all(trial.fits(target) for trial in trials)
    kinds = {name.split("_")[0] for name in space.names}
    assert kinds == {"keep", "wide", "first", "average", "library"}
    used = {b.start for trial in trials for b in trial.plan.blocks if not b.untouched}
    assert used == {"first", "average", "library"}
    # The exact plan: early spans do less damage trained, late ones untrained.
    assert space.damage(trials[0].plan) == min(space.damage(trial.plan) for trial in trials)
    model = teacher.transformer()
    probe = make_probe(model, teacher.family, open_latents(store, "encoded/x"), bench.probe, 0)
    for trial in trials:
        loss = fidelity_loss(assemble(model, trial.plan, library), teacher.family, probe)
        assert trial.fidelity_loss == pytest.approx(loss, rel=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_processes_of_a_node_share_teacher_library_and_probe(bench: Bench) -> None:
    scorer = bench.open()
    for block, _ in bench.replacements:
        scorer.score(plan_around(block))
    opened = bench.open()  # another process, to all intents: the first one made the probe
    opened.score(plan_around(bench.replacements[0][0]))
    merged = BlockPlan(span=(3, 5), start="middle")
    as_the_teacher = opened._block(merged, plan_around(merged))
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [
        range(*(int(end, 16) for end in line[0].split("-")))
        for line in lines
        if line[-1].endswith(".safetensors")
    ]
    weights = {
        "teacher": next(iter(opened._model.parameters())),
        "library": next(iter(next(iter(opened._loaded.values())).parameters())),
        "one of the teacher's blocks, for several": next(iter(as_the_teacher.parameters())),
        "probe": opened._probe.chunks[0].velocity_BNC,
    }
    for name, tensor in weights.items():
        assert any(tensor.data_ptr() in place for place in mapped), name


def test_a_gpu_keeps_the_replacements_that_were_asked_for_last(bench: Bench) -> None:
    opened, blocks = bench.open(), [block for block, _ in bench.replacements]
    first, second, third = blocks[0], blocks[4], blocks[1]  # of one size

    def free() -> int:
        size = weight_bytes([opened._own[0]])
        return 2 * size + scorer._passing() - weight_bytes([*scorer._loaded.values()])

    scorer = Scorer(
        bench.teacher, opened._model, opened._library, opened._probe, opened.store, free=free
    )
    for block in (first, second, first):
        scorer.score(plan_around(block))
    assert list(scorer._loaded) == [second, first]
    weights = [weakref.ref(next(scorer._loaded[block].parameters())) for block in (second, first)]
    scorer.score(plan_around(third))
    assert list(scorer._loaded) == [first, third]
    assert [weight() is None for weight in weights] == [True, False]

    # All of one plan's stay, whether there is room or not.
    spans = [block for block in blocks if block.span in ((0, 1), (2, 3), (4, 5))]
    whole = plan_around(*spans)
    assert scorer.score(whole).fidelity_loss == opened.score(whole).fidelity_loss
    assert list(scorer._loaded) == spans
    assert len(opened._loaded) == len(spans)


def plan_around(*made: BlockPlan) -> Plan:
    covered = {i for block in made for i in range(block.span[0], block.span[1] + 1)}
    alone = [BlockPlan(span=(i, i)) for i in range(6) if i not in covered]
    blocks = tuple(sorted([*alone, *made], key=lambda b: b.span))
    return Plan(family="qwen_image", teacher_blocks=6, blocks=blocks)


def test_trials_are_published_in_order(trials: list[Trial], store: Store) -> None:
    assert [trial.number for trial in trials] == list(range(10))
    assert load_trials(store, "sweeps/one/search") == trials
    assert load_trials(store, "sweeps/none/search") is None


def test_pareto_and_best(trials: list[Trial], targets: list[Target]) -> None:
    front = pareto_trials(trials)
    best = best_trials(trials, targets[1])[0]
    assert best.fidelity_loss == min(t.fidelity_loss for t in trials if t.fidelity_loss is not None)
    assert best in front


def test_trials_say_what_was_predicted_of_them(trials: list[Trial], space: Space) -> None:
    for trial in trials:
        pieces = [space.pieces[block].damage for block in trial.plan.blocks]
        assert trial.damage == pytest.approx(sum(pieces))
    damages = [trial.damage for trial in trials]
    in_order = [
        replace(trial, fidelity_loss=2 * damage)
        for trial, damage in zip(trials, damages, strict=True)
    ]
    assert agreement(in_order) == pytest.approx(1.0)
    reversed_ = [
        replace(trial, fidelity_loss=1 / damage)
        for trial, damage in zip(trials, damages, strict=True)
    ]
    assert agreement(reversed_) == pytest.approx(-1.0)
    unscored = [replace(trial, fidelity_loss=None) for trial in trials]
    assert agreement(unscored) is None
    assert agreement([*in_order[:2], *unscored]) is None


def test_a_cut_off_search_scores_only_what_is_missing(
    ray: None, trials: list[Trial], space: Space, targets: list[Target], bench: Bench, store: Store
) -> None:
    lost = [bench.key(trial.plan) for trial in (trials[2], trials[9])]
    kept = {key: store.read(key).read() for key in store.keys(bench.scores)}
    for key in lost:
        store.remove(key)
    again = run_search(space, targets, bench, CONFIG, store, "sweeps/two/search", cpus=2.0)
    assert [t.plan for t in again] == [t.plan for t in trials]
    assert [t.fidelity_loss for t in again] == pytest.approx([t.fidelity_loss for t in trials])
    now = {key: store.read(key).read() for key in store.keys(bench.scores)}
    assert {key for key in kept if now[key] != kept[key]} == set(lost)


def test_several_runs_of_tune_are_one_search(
    ray: None,
    trials: list[Trial],
    space: Space,
    targets: list[Target],
    bench: Bench,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("search.trials.ROUND", 4)
    anew = replace(bench, scores="rounds/scores")
    again = run_search(space, targets, anew, CONFIG, store, "sweeps/rounds/search", cpus=2.0)
    assert [t.plan for t in again] == [t.plan for t in trials]
    assert [t.fidelity_loss for t in again] == pytest.approx([t.fidelity_loss for t in trials])
    assert [t.expected for t in again] == pytest.approx([t.expected for t in trials])
    assert len(list(store.keys("rounds/scores"))) == len(trials)


def test_a_replacement_that_gives_nan_fails_its_trials_alone(
    ray: None, space: Space, targets: list[Target], bench: Bench, store: Store
) -> None:
    (block, _), *others = bench.replacements
    with store.read(f"library/t/0/{TENSORS}") as stream:
        import safetensors.torch

        tensors = {k: v * float("nan") for k, v in safetensors.torch.load(stream.read()).items()}
    meta = ReplacementMeta(block=block, damage=0.1).model_dump(mode="json")
    publish(store, "library/t/nan", {TENSORS: save_tensors(tensors)}, meta)
    broken = replace(bench, replacements=((block, "library/t/nan"), *others))
    trials = run_search(space, targets, broken, CONFIG, store, "sweeps/three/search", cpus=1.0)
    for trial in trials:
        failed = block in trial.plan.blocks
        assert trial.state == ("failed" if failed else "complete")
        assert (trial.fidelity_loss is None) == failed
        assert trial.failed == ("its velocity is not a number" if failed else None)
    assert {trial.state for trial in trials} == {"failed", "complete"}
    assert len(trials) == CONFIG.trials


def test_a_missing_replacement_ends_the_search_with_its_name(
    ray: None, space: Space, targets: list[Target], bench: Bench, store: Store
) -> None:
    (block, _), *others = bench.replacements
    broken = replace(bench, replacements=((block, "library/t/gone"), *others))
    with pytest.raises(SearchError, match="library/t/gone"):
        run_search(space, targets, broken, CONFIG, store, "sweeps/four/search")


Trouble = Literal["raises", "hangs", "lost", "stops"]


@dataclass(frozen=True)
class Troubled(Bench):
    """Has trouble with one plan."""

    victim: str = ""
    """Its digest."""
    trouble: Trouble = "raises"
    """`raises`, as when a device has no memory left for it; of its process it may be `lost` once,
    and then something `stops` the search."""

    def open(self) -> Scorer:
        scorer = super().open()
        score = scorer.score

        def troubled(plan: Plan) -> Score:
            if plan.digest != self.victim:
                return score(plan)
            if self.trouble == "hangs":
                threading.Event().wait()
            if self.trouble == "raises":
                raise RuntimeError("out of memory\nsomewhere")
            if not [*scorer.store.keys(f"{self.scores}-lost")]:
                scorer.store.write(f"{self.scores}-lost/{plan.digest}", b"")
                os.kill(os.getpid(), signal.SIGKILL)
            if self.trouble == "stops":
                raise StoreError("the bucket is full")
            return score(plan)

        scorer.score = troubled  # type: ignore[method-assign]
        return scorer


def troubled(bench: Bench, scores: str, victim: Plan, trouble: Trouble) -> Troubled:
    known = {f.name: getattr(bench, f.name) for f in fields(bench)} | {"scores": scores}
    return Troubled(**known, victim=victim.digest, trouble=trouble)


def test_a_plan_that_cannot_be_scored_fails_alone_and_says_why(
    ray: None,
    trials: list[Trial],
    space: Space,
    targets: list[Target],
    bench: Bench,
    store: Store,
    tmp_path: Path,
) -> None:
    raising = troubled(bench, "raising", trials[2].plan, "raises")
    config = CONFIG.model_copy(update={"trials": 5})
    journal = str(tmp_path / "raising.journal")
    log = StudyLog(journal, "raising", "t", "s", None)
    found = run_search(space, targets, raising, config, store, "sweeps/raising/search", log=log)
    shown = optuna.load_study(study_name="raising", storage=open_storage(journal)).trials
    assert [t.state.name for t in shown] == [
        "FAIL" if trial.failed else "COMPLETE" for trial in found
    ]
    assert [trial.failed for trial in found] == [
        None, None, "RuntimeError: out of memory", None, None,
    ]  # fmt: skip


def test_a_plan_whose_process_is_lost_is_scored_by_another(
    ray: None,
    trials: list[Trial],
    space: Space,
    targets: list[Target],
    bench: Bench,
    store: Store,
    caplog: pytest.LogCaptureFixture,
) -> None:
    losing = troubled(bench, "losing", trials[2].plan, "lost")
    config = CONFIG.model_copy(update={"trials": 5})
    found = run_search(space, targets, losing, config, store, "sweeps/losing/search")
    assert [*store.keys("losing-lost")]
    assert [trial.fidelity_loss for trial in found] == [t.fidelity_loss for t in trials[:5]]
    assert not [record for record in caplog.records if record.name.startswith("ray")]


def test_what_stops_a_search_is_told_without_what_was_made_good_before(
    ray: None,
    trials: list[Trial],
    space: Space,
    targets: list[Target],
    bench: Bench,
    store: Store,
) -> None:
    stopping = troubled(bench, "stopping", trials[2].plan, "stops")
    with pytest.raises(SearchError) as stopped:
        run_search(space, targets, stopping, CONFIG, store, "sweeps/stopping/search")
    assert str(stopped.value) == "search stopped: trial 2: the bucket is full"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_plan_that_hangs_fails_alone_and_stays_failed(
    ray: None,
    trials: list[Trial],
    space: Space,
    targets: list[Target],
    bench: Bench,
    store: Store,
) -> None:
    hanging = troubled(bench, "hanging", trials[3].plan, "hangs")
    config = CONFIG.model_copy(update={"trials": 6, "timeout": 30.0})
    found = run_search(space, targets, hanging, config, store, "sweeps/five/search", cpus=2.0)
    assert [trial.plan for trial in found[:4]] == [trial.plan for trial in trials[:4]]
    assert [trial.state for trial in found] == [*["complete"] * 3, "failed", *["complete"] * 2]
    assert "search.timeout" in (found[3].failed or "")
    again = run_search(space, targets, hanging, config, store, "sweeps/six/search", cpus=2.0)
    assert again == found


def test_budgets_of_a_device_are_searched_and_every_plan_is_measured(
    ray: None, teacher: Teacher, store: Store, bench: Bench
) -> None:
    model, family = teacher.transformer(), teacher.family
    latents, settings = open_latents(store, "encoded/x"), MeasureConfig(warmup=0, repeats=3)
    inputs = measuring_inputs(latents, 64, settings, "cpu", torch.float32)
    blocks = [BlockPlan(span=(i, i)) for i in range(6)] + [b for b, _ in bench.replacements]
    table = measure_table(model, family, teacher.config, blocks, inputs, settings)
    space = library_space(teacher, Library(store, dict(bench.replacements)), table)
    targets = [
        Target("70pct-memory", int(0.7 * table.teacher.memory), "memory"),
        Target("75pct-latency", int(0.75 * table.teacher.latency), "latency", margin=0.05),
    ]
    config = CONFIG.model_copy(update={"objectives": ("latency", "fidelity_loss", "memory")})
    trials = run_search(
        space,
        targets,
        replace(bench, measuring=Measuring(table, settings, 64)),
        config,
        store,
        "sweeps/device/search",
        cpus=0.5,
    )
    # How many plans fit follows latencies, which are this machine's.
    assert {trial.budget for trial in trials} == {target.label for target in targets}
    by_label = {target.label: target for target in targets}
    for trial in trials:
        target = by_label[trial.budget]
        measured = trial.measured[target.currency]
        assert trial.cost(target.currency) <= target.room
        assert trial.over == pytest.approx(measured / target.limit - 1)
        assert trial.measured["memory"] == pytest.approx(trial.costs["memory"], rel=0.02)
        assert trial.measured["latency"] > 0
    assert load_trials(store, "sweeps/device/search") == trials
    best = best_trials(trials, targets[0], None)
    assert best
    assert all(trial.measured["memory"] <= targets[0].limit for trial in best)
    front = pareto_trials(trials, ("latency", "fidelity_loss", "memory"))
    assert min(t.cost("latency") for t in front) == min(t.cost("latency") for t in trials)

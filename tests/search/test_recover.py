"""Recovering finalists on Ray Train itself: with a worker killed, tier by tier."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from search.recover import (
    Book,
    Grounds,
    RecoverConfig,
    Recovery,
    agreements,
    placed,
    recover_finalists,
)
from search.tiers import Candidate, Finalist, Run
from storage import layout
from storage.garbage import find_garbage
from storage.manifest import publish, published, read_json, withdraw
from storage.store import Store, StoreOptions, open_store
from storage.tensors import save_tensors
from tests.trainers.small import local_ray, small_latents
from trainers.data.latents import CAPTIONS, TENSORS, EncodedMeta, open_latents, shard_prefix
from trainers.distilled import Distilled, Observed
from trainers.library.library import TENSORS as BLOCK
from trainers.placement import Share
from trainers.probe import ProbeConfig
from trainers.recovery import examples_of, recover
from trainers.schedule import PhaseSpace, ScheduleSpace
from trainers.students.plan import BlockPlan, Plan
from trainers.students.surgery import assemble, make_block
from trainers.teacher import Teacher, open_teacher
from trainers.worker import LOSSES, RecoveryOutcome, load_student

GOOD = BlockPlan(span=(1, 2), start="library")
BROKEN = BlockPlan(span=(2, 3), start="library")
STEPS = 120


def plan_with(block: BlockPlan) -> Plan:
    first, last = block.span
    alone = [BlockPlan(span=(i, i)) for i in range(6) if not first <= i <= last]
    blocks = sorted([*alone, block], key=lambda b: b.span)
    return Plan(family="qwen_image", teacher_blocks=6, blocks=tuple(blocks))


@dataclass
class Killer:
    """Kills one worker of the first recovery once, when there is a checkpoint to go on from."""

    store: Store
    killed: int | None = None

    def update(self, done: int, total: int, **facts: float | str) -> None:
        checkpoints = [k for k in self.store.keys("sweeps") if "/checkpoints/step-" in k]
        if self.killed is None and any(k.endswith("manifest.json") for k in checkpoints):
            self.killed = self._worker()
            os.kill(self.killed, signal.SIGKILL)

    def _worker(self) -> int:
        import ray._private.state

        actors = ray._private.state.actors().values()
        pids = [a["Pid"] for a in actors if a["ActorClassName"] == "RayTrainWorker"]
        return next(pid for pid in pids if Path(f"/proc/{pid}").exists())


@pytest.mark.parametrize(
    ("workers", "concurrent", "expected"),
    [
        (1, 1, (1, 1)),
        (4, 1, (2, 2)),  # no two share a GPU
        ((1, 2), 2, (1, 2)),
        ((1, 8), 1, (1, 8)),  # machines may come
        ((4, 8), 1, (2, 8)),
    ],
)
def test_every_worker_has_a_gpu_of_its_own(
    workers: Any, concurrent: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 16.0}}])
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 16.0, "GPU": 2.0})
    config = RecoverConfig(workers=workers, concurrent=concurrent)
    found, share = placed(config, "gpu")
    assert found == expected
    assert share.num_gpus == 1


@pytest.mark.timeout(900)
def test_a_recovery_on_ray_train_outlives_a_killed_worker(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store, teacher = open_store(str(tmp_path / "store")), open_teacher(tiny_pipeline)
    put_latents(store)
    put_replacements(store, teacher)
    config = RecoverConfig(
        finalists=2,
        schedules=1,
        workers=(1, 2),  # with as many as are left when one is killed
        keep=1,
        checkpoint_every=10,
        space=ScheduleSpace(
            phases=(
                PhaseSpace(loss="span", steps=20, lr=1e-3, batch_size=4, magnitude=0),
                PhaseSpace(loss="velocity", train="all", steps=STEPS - 20, lr=1e-3, batch_size=4),
            )
        ),
    )
    killer = Killer(store)
    arguments: dict[str, Any] = {
        "sweep": "tiny",
        "teacher": teacher,
        "store": store,
        "options": StoreOptions(),
        "encoding": "encoded/tiny",
        "replacements": {GOOD: "library/tiny/good", BROKEN: "library/tiny/broken"},
        "config": config,
        "accelerator": "cpu",
        "probe": ProbeConfig(pictures=2, timesteps=2),
        "seed": 5,
    }
    finalists = [
        Finalist("half", 0, plan_with(GOOD), 1.0),
        Finalist("half", 1, plan_with(BROKEN), 2.0),
    ]
    with local_ray():
        recovered, broken = recover_finalists(finalists, progress=killer, **arguments)
        written = {key: store.read(key).read() for key in store.keys("sweeps")}
        again = recover_finalists(finalists, **arguments)

    assert killer.killed is not None
    assert recovered.failed is None
    assert recovered.fidelity_loss is not None
    # Every step, before and after the kill, is the step of a run on one process.
    alone = alone_losses(store, teacher, recovered)
    assert read_json(store, prefix_of(recovered), LOSSES) == pytest.approx(alone, rel=1e-3)
    student, plan = load_student(store, recovered.student, teacher)
    assert plan == finalists[0].plan
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())
    assert not [key for key in written if "/checkpoints/" in key]

    assert broken.failed is not None
    assert "not finite" in broken.failed
    assert broken.fidelity_loss is None

    assert again == [recovered, broken]
    assert written == {key: store.read(key).read() for key in store.keys("sweeps")}


def put_latents(store: Store) -> None:
    latents = small_latents(pictures=12, held_out=2, shard=12)
    (shard,) = latents.shards
    # All captions equally long: a mean over real tokens is then the mean of two ranks' means.
    mask = torch.ones_like(shard.mask)
    files = {
        TENSORS: save_tensors({"latents": shard.latents, "embeds": shard.embeds, "mask": mask}),
        CAPTIONS: json.dumps(shard.captions).encode(),
    }
    publish(store, shard_prefix("encoded/tiny", 0), files)
    meta = EncodedMeta(shards=1, pictures=12, held_out=2)
    publish(store, "encoded/tiny", {}, meta.model_dump(mode="json"))


def put_replacements(store: Store, teacher: Teacher) -> None:
    model = teacher.transformer()
    blocks = teacher.family.block_modules(model)
    for name, block in (("good", GOOD), ("broken", BROKEN)):
        first = block.model_copy(update={"start": "first"})
        weights = make_block(teacher.family, teacher.config, blocks, first).state_dict()
        if name == "broken":
            weights = {key: torch.full_like(tensor, torch.nan) for key, tensor in weights.items()}
        publish(store, f"library/tiny/{name}", {BLOCK: save_tensors(weights)})


def alone_losses(store: Store, teacher: Teacher, recovery: Recovery) -> list[float]:
    model = teacher.transformer()
    blocks = teacher.family.block_modules(model)
    first = GOOD.model_copy(update={"start": "first"})
    weights = make_block(teacher.family, teacher.config, blocks, first).state_dict()
    student = assemble(model, recovery.plan, lambda block: weights)
    losses: list[float] = []
    recover(
        Distilled(teacher.family, student, recovery.plan),
        Observed(teacher.family, model),
        examples_of(open_latents(store, "encoded/tiny"), 5),
        recovery.schedule,
        report=lambda _, loss: losses.append(loss),
    )
    return losses


def grounds_of(tiny_pipeline: Path, store: Store) -> Grounds:
    return Grounds(
        sweep="tiny",
        teacher=open_teacher(tiny_pipeline),
        store=store,
        options=StoreOptions(),
        encoding="encoded/tiny",
        replacements={GOOD: "library/tiny/good"},
        config=RecoverConfig(tiers=(0.5, 1)),
        share=Share(1, 0, 1, "cpu"),
        probe=ProbeConfig(),
        seed=5,
    )


def candidate_of(grounds: Grounds) -> Candidate:
    space = grounds.config.space
    finalist = Finalist("half", 0, plan_with(GOOD), 1.0)
    return Candidate(finalist, 0, space.schedule(space.middle()))


def test_only_a_run_that_left_no_outcome_has_broken_off(
    tiny_pipeline: Path, tmp_path: Path
) -> None:
    store = open_store(str(tmp_path / "store"))
    grounds = grounds_of(tiny_pipeline, store)
    candidate = candidate_of(grounds)
    book = Book(grounds)
    outcome = RecoveryOutcome(fidelity_loss=None, failed="not finite", seconds=1.0, steps=3)
    publish(store, grounds.job(candidate, 0).prefix, {}, outcome.model_dump(mode="json"))
    book.ended(Run(candidate, 0))
    assert book(candidate, 0) == outcome
    assert book.broken == set()
    book.ended(Run(candidate, 1), "its process was lost")
    assert book.broken == {candidate}
    found = book(candidate, 1)
    assert found is not None
    assert found.failed == "its process was lost"
    # Whoever comes next tries it again.
    assert Book(grounds)(candidate, 1) is None


def test_what_was_chosen_for_schedules_is_kept(tiny_pipeline: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    grounds = grounds_of(tiny_pipeline, store)
    finalist = candidate_of(grounds).finalist
    assert Book(grounds).choices(finalist) == []
    choices = [grounds.config.space.middle(), {"phases[0].steps": 7, "phases[0].lr": 1e-3 / 3}]
    Book(grounds).chose(finalist, choices)
    assert Book(grounds).choices(finalist) == choices
    # Of another sampler, or anything else that decides them, they say nothing.
    config = grounds.config.model_copy(update={"sampler": "gp"})
    assert Book(replace(grounds, config=config)).choices(finalist) == []
    for damaged in (b"[{", b"{}x", b"3", b'[{"lr": "x"}]', b"\xff"):
        store.write(grounds.proposed(finalist), damaged)
        assert Book(grounds).choices(finalist) == []
    assert not find_garbage(store, 0)


def test_a_student_that_somebody_removed_is_recovered_again(
    tiny_pipeline: Path, tmp_path: Path
) -> None:
    store = open_store(str(tmp_path / "store"))
    grounds = grounds_of(tiny_pipeline, store)
    candidate = candidate_of(grounds)
    half, whole = grounds.job(candidate, 0), grounds.job(candidate, 1)
    for job in (half, whole):
        outcome = RecoveryOutcome(fidelity_loss=0.5, seconds=1.0, steps=job.until)
        publish(store, job.prefix, {}, outcome.model_dump(mode="json"))
    publish(store, whole.student, {})
    assert all(Book(grounds)(candidate, tier) for tier in (0, 1))

    withdraw(store, whole.student)
    book = Book(grounds)
    assert book(candidate, 0) is not None
    assert book(candidate, 1) is None
    # Or its workers would take it for done.
    assert published(store, whole.prefix) is None


def test_a_student_that_was_passed_over_when_others_were_published_is_not_missed(
    tiny_pipeline: Path, tmp_path: Path
) -> None:
    store = open_store(str(tmp_path / "store"))
    grounds = grounds_of(tiny_pipeline, store)
    candidate = candidate_of(grounds)
    whole = grounds.job(candidate, 1)
    outcome = RecoveryOutcome(fidelity_loss=0.5, seconds=1.0, steps=whole.until)
    publish(store, whole.prefix, {}, outcome.model_dump(mode="json"))
    facts: Any = {"students": {"half": {"finalist": "another", "prefix": "models/half/x"}}}
    publish(store, layout.stage(grounds.sweep, "publish"), {}, {"facts": facts})
    assert Book(grounds)(candidate, 1) == outcome
    facts["students"]["half"]["finalist"] = whole.student
    publish(store, layout.stage(grounds.sweep, "publish"), {}, {"facts": facts})
    assert Book(grounds)(candidate, 1) is None


def prefix_of(recovery: Recovery) -> str:
    trial = ("tiny", recovery.budget, recovery.trial)
    return layout.measured(*trial, recovery.schedule.steps)


@pytest.mark.timeout(900)
def test_who_goes_on_continues_from_where_it_was_measured(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store, teacher = open_store(str(tmp_path / "store")), open_teacher(tiny_pipeline)
    put_latents(store)
    put_replacements(store, teacher)
    config = RecoverConfig(
        schedules=2,
        tiers=(0.3, 1),
        space=ScheduleSpace(
            phases=(
                PhaseSpace(loss="span", steps=6, lr=1e-3, batch_size=4, magnitude=0),
                PhaseSpace(loss="velocity", train="all", steps=14, lr=(1e-4, 1e-2), batch_size=4),
            )
        ),
    )
    with local_ray():
        recoveries = recover_finalists(
            [Finalist("half", 0, plan_with(GOOD), 1.0)],
            sweep="tiny",
            teacher=teacher,
            store=store,
            options=StoreOptions(),
            encoding="encoded/tiny",
            replacements={GOOD: "library/tiny/good"},
            config=config,
            accelerator="cpu",
            probe=ProbeConfig(pictures=2, timesteps=2),
            seed=5,
        )
    went, stopped = sorted(recoveries, key=lambda recovery: recovery.state)
    assert (went.state, stopped.state) == ("complete", "stopped")
    assert [measured.part for measured in went.measured] == [0.3, 1]
    assert [measured.part for measured in stopped.measured] == [0.3]
    assert went.measured[0].fidelity_loss <= stopped.measured[0].fidelity_loss
    # The steps after the halt are the steps of a run without one.
    alone = alone_losses(store, teacher, went)
    assert read_json(store, prefix_of(went), LOSSES) == pytest.approx(alone, rel=1e-3)
    assert load_student(store, went.student, teacher)[1] == went.plan
    assert not [key for key in store.keys("sweeps") if "/checkpoints/" in key]
    assert agreements(recoveries) == []

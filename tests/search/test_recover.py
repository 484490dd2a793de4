"""Recovering finalists: lanes of schedules, and Ray Train itself with a worker killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from search.recover import Finalist, Lane, RecoverConfig, Recovery, Trial, recover_finalists
from storage.manifest import publish, read_json
from storage.store import Store, StoreOptions, open_store
from storage.tensors import save_tensors
from tests.trainers.small import local_ray, small_latents
from trainers.data.latents import CAPTIONS, TENSORS, EncodedMeta, open_latents, shard_prefix
from trainers.distilled import Distilled, Observed
from trainers.library.library import TENSORS as BLOCK
from trainers.library.library import library_block
from trainers.probe import ProbeConfig
from trainers.recovery import examples_of, recover
from trainers.schedule import PhaseSpace, Schedule, ScheduleSpace
from trainers.students.plan import BlockPlan, Plan
from trainers.students.surgery import assemble, make_block
from trainers.teacher import Teacher, open_teacher
from trainers.worker import LOSSES, RecoveryOutcome, load_student

SPACE = ScheduleSpace(
    phases=(
        PhaseSpace(loss="span", steps=(10, 40), lr=(1e-4, 1e-2)),
        PhaseSpace(loss="velocity", train="all", steps=30, lr=(1e-4, 1e-2)),
    )
)
PLAN = Plan(
    family="qwen_image",
    teacher_blocks=2,
    blocks=(BlockPlan(span=(0, 1)),),
)


@dataclass
class Bench:
    """Stands in for the store: the outcomes of trials that ran."""

    losses: Mapping[int, float | None]
    """By number of the schedule; None fails."""
    outcomes: dict[str, RecoveryOutcome] = field(default_factory=dict)
    ran: list[Schedule] = field(default_factory=list)

    def lane(self, seed: int = 0) -> Lane:
        return Lane(
            Finalist("half", 0, PLAN, 1.0), SPACE, len(self.losses), seed, self.trial, self.outcome
        )

    def trial(self, finalist: Finalist, number: int, schedule: Schedule) -> Trial:
        return Trial(finalist, schedule, f"{number}-{schedule.model_dump_json()}", job=None)  # type: ignore[arg-type]  # a lane does not look inside

    def outcome(self, trial: Trial) -> RecoveryOutcome | None:
        return self.outcomes.get(trial.name)

    def run(self, lane: Lane, most: int = 99) -> list[Schedule]:
        while lane.advance() and most > 0:
            trial = lane.take()
            loss = self.losses[int(trial.name.split("-")[0])]
            failed = "not finite" if loss is None else None
            self.outcomes[trial.name] = RecoveryOutcome(
                fidelity_loss=loss, failed=failed, seconds=1.0, steps=1
            )
            self.ran.append(trial.schedule)
            lane.end()
            most -= 1
        return [trial.schedule for trial, _ in lane.ended]


def test_a_lane_starts_in_the_middle_and_stays_within_the_ranges() -> None:
    bench = Bench({0: 0.3, 1: 0.2, 2: 0.1, 3: 0.4, 4: 0.3})
    schedules = bench.run(bench.lane())
    assert schedules[0] == SPACE.schedule(SPACE.middle())
    assert len({schedule.model_dump_json() for schedule in schedules}) == 5
    assert all(10 <= s.phases[0].steps <= 40 and s.phases[1].steps == 30 for s in schedules)


def test_a_lane_cut_off_goes_on_as_if_it_had_not_been() -> None:
    losses = {0: 0.3, 1: None, 2: 0.1, 3: 0.4}
    whole = Bench(losses)
    cut = Bench(losses)
    wanted = whole.run(whole.lane())
    cut.run(cut.lane(), most=2)
    assert cut.run(cut.lane()) == wanted
    assert len(cut.ran) == 4


def test_a_failed_trial_does_not_stop_its_lane() -> None:
    bench = Bench({0: None, 1: 0.2})
    lane = bench.lane()
    assert len(bench.run(lane)) == 2
    assert lane.done
    assert lane.best == 0.2


def test_lanes_of_other_seeds_explore_elsewhere() -> None:
    one, two = Bench({0: 0.3, 1: 0.2}), Bench({0: 0.3, 1: 0.2})
    assert one.run(one.lane(seed=1))[1] != two.run(two.lane(seed=2))[1]


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


@pytest.mark.timeout(900)
def test_a_recovery_on_ray_train_outlives_a_killed_worker(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store, teacher = open_store(str(tmp_path / "store")), open_teacher(tiny_pipeline)
    put_latents(store)
    put_replacements(store, teacher)
    config = RecoverConfig(
        schedules=1,
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
    first = library_block(GOOD).model_copy(update={"start": "first"})
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


def prefix_of(recovery: Recovery) -> str:
    return recovery.student.rsplit("/", 1)[0]

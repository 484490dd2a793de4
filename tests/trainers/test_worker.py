"""What the workers of a Ray Train job do between one recovery and the next, and where they go back
to; recoveries on Ray Train itself are in tests/search/test_recover.py."""

from __future__ import annotations

import faulthandler
import gc
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch
import torch.distributed

from storage import layout
from storage.manifest import publish
from storage.store import StoreOptions, open_store
from tests.search.test_recover import plan_with, put_latents
from trainers import recovery, worker
from trainers.desk import Taken
from trainers.distilled import Distilled, local
from trainers.probe import ProbeConfig
from trainers.schedule import Phase, Schedule, StepConfig
from trainers.students.plan import BlockPlan
from trainers.teacher import open_teacher


class Model:
    """Holds itself, as a module and the hooks on it do."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What lies on the desk, in its order, seen by the only worker; it is closed afterwards."""
    left: list[Any] = []
    line = SimpleNamespace(
        take=lambda: Taken(left.pop(0), closed=False) if left else Taken(None, closed=True),
        tell=lambda facts: None,
        finish=lambda: None,
    )
    alone = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: alone)
    monkeypatch.setattr(worker, "Line", lambda desk, rank: line)
    monkeypatch.setattr(worker, "_from_first_rank", lambda taken: taken)
    monkeypatch.setattr(worker.RecoveryJob, "model_validate", lambda job: job)
    return left


def test_jobs_are_done_in_turn_until_the_desk_is_closed(
    found: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(worker, "run_job", lambda job, *_: done.append(job) or True)
    found += [{"step": 1}, None, {"step": 2}]
    assert worker.train_loop({"desk": None}) is True
    assert done == [{"step": 1}, {"step": 2}]


def test_a_worker_that_leaves_does_not_take_the_next_job(
    found: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "run_job", lambda job, *_: False)
    found += [{"step": 1}, {"step": 2}]
    assert worker.train_loop({"desk": None}) is False
    assert found == [{"step": 2}]


def test_what_a_job_held_is_let_go_before_the_next(
    found: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Model]] = []
    alive: list[int] = []

    def run(*_: Any) -> bool:
        alive.append(sum(model() is not None for model in models))
        models.append(weakref.ref(Model()))
        return True

    monkeypatch.setattr(worker, "run_job", run)
    found += [{"step": 1}, {"step": 2}, {"step": 3}]
    gc.disable()
    try:
        worker.train_loop({"desk": None})
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


def test_what_a_lost_attempt_left_of_its_student_is_cleared_away(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = open_store(s3_url)
    for prefix in ("run/student", "other/student"):
        store._call("create_multipart_upload", Key=f"{store._prefix}/{prefix}/w")
    job = worker.RecoveryJob.model_construct(
        store=store.url, options=StoreOptions(), prefix="run/end", student="run/student", until=9,
        schedule=SimpleNamespace(steps=9), timeout=1.0,
    )  # fmt: skip

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    # The watchdog is the first thing that a job starts once it is to run.
    monkeypatch.setattr("faulthandler.dump_traceback_later", stop)
    for rank, left in ((1, ["other/student/w", "run/student/w"]), (0, ["other/student/w"])):
        with pytest.raises(KeyboardInterrupt):
            worker.run_job(job, rank, 2, lambda facts: None)
        assert [upload.key for upload in store.unfinished("")] == left


@pytest.mark.parametrize(("until", "left"), [(4, True), (9, False)])
def test_an_attempt_that_was_lost_at_its_very_end_is_only_cleared_up_after(
    tmp_path: Path, until: int, left: bool
) -> None:
    store = open_store(str(tmp_path))
    publish(store, "run/checkpoints/step-000000004", {"state.json": b"{}"})
    outcome = worker.RecoveryOutcome(fidelity_loss=0.5, seconds=1.0, steps=until)
    publish(store, "run/end", {}, outcome.model_dump(mode="json"))
    job = worker.RecoveryJob.model_construct(
        store=store.url, options=StoreOptions(), prefix="run/end", checkpoints="run/checkpoints",
        until=until, schedule=SimpleNamespace(steps=9),
    )  # fmt: skip
    for rank in (1, 0):
        assert worker.run_job(job, rank, 2, lambda facts: None) is True
    # Who may still go on from there needs its checkpoint.
    assert bool(list(store.keys("run/checkpoints"))) is left


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process group of the only worker, which nobody gives notice."""
    monkeypatch.setattr("trainers.notice._ASK_SECONDS", math.inf)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    faulthandler.cancel_dump_traceback_later()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("kept", "again"), [(2, 6), (1, 8)], ids=["before it", "the start"])
def test_from_a_checkpoint_that_is_spoiled_itself_training_goes_back_to_the_one_before(
    group: None,
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept: int,
    again: int,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store, steps = open_store(str(tmp_path / "store")), 8
    put_latents(store)
    where = ("tiny", "half", "0-0")
    phase = Phase(loss="diffusion", train="all", steps=steps, lr=1e-3, batch_size=4, warmup=0)
    job = worker.RecoveryJob(
        teacher=str(tiny_pipeline), teacher_digest=open_teacher(tiny_pipeline).digest,
        store=store.url, options=StoreOptions(), encoding="encoded/tiny", replacements=(),
        plan=plan_with(BlockPlan(span=(1, 2))), schedule=Schedule(phases=(phase,)),
        step=StepConfig(rollbacks=2), until=steps,
        probe=ProbeConfig(pictures=2, timesteps=2), seed=5, probe_seed=5,
        prefix=layout.measured(*where, steps), checkpoints=layout.checkpoint(*where),
        student=layout.finalist(*where), checkpoint_every=2, keep_checkpoints=kept, timeout=600,
        shard_teacher=False, num_cpus=1, num_gpus=0, threads=1, device="cpu",
    )  # fmt: skip
    train_step, taken = recovery.train_step, []

    def spoiling_the_fourth(student: Distilled, *given: Any) -> float:
        taken.append(train_step(student, *given))
        if len(taken) == 4:
            for parameter in student.parameters():
                local(parameter.detach()).fill_(math.nan)
        return taken[-1]

    monkeypatch.setattr(recovery, "train_step", spoiling_the_fourth)
    assert worker.run_job(job, 0, 1, lambda facts: None) is True
    outcome = worker.read_outcome(store, job.prefix)
    assert outcome is not None
    assert outcome.failed is None
    assert outcome.steps == steps
    # The fifth step fails, at once again from the checkpoint before it, and then not any more.
    assert [math.isfinite(loss) for loss in taken] == [True] * 4 + [False] * 2 + [True] * again

"""Libraries and recoveries on Ray, with checkpoints on a real S3 server: who dies, what goes on."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from search.recover import Recovery
from storage.manifest import read_json
from storage.store import Store, open_store
from tests.faults.conftest import Row
from tests.faults.proxy import altered
from tests.faults.steps import attempts, probing, spoil_a_replacement, spoil_a_step
from tests.faults.test_storage import everything_is_published
from tests.faults.tiny_recovery import prepare, recover_tiny
from tests.nodes import ROOT
from tests.search.test_recover import STEPS, Killer, alone_losses, prefix_of
from tests.trainers.library.setting import (
    ENCODING,
    LONG,
    MANY,
    PROBE,
    SWEEP,
    Hit,
    put_latents,
    trained_digests,
)
from tests.trainers.library.setting import checkpoints as checkpoints_of_library
from tests.trainers.small import local_ray
from trainers.library.library import LOSSES as BLOCK_LOSSES
from trainers.library.workers import train_library
from trainers.teacher import Teacher, open_teacher
from trainers.worker import LOSSES, load_student

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture
def teacher(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Teacher:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return open_teacher(tiny_pipeline)


@pytest.fixture
def store(s3_url: str, teacher: Teacher) -> Store:
    store = open_store(s3_url)
    prepare(store, teacher)
    return store


def checkpoints(store: Store) -> list[str]:
    keys = store.keys("sweeps")
    return [key for key in keys if "/checkpoints/" in key and key.endswith("manifest.json")]


def nothing_is_lost(store: Store, teacher: Teacher, recovered: Recovery) -> None:
    """Every step is the step of a run on one process, and nothing is left over."""
    assert recovered.failed is None
    alone = alone_losses(store, teacher, recovered)
    assert read_json(store, prefix_of(recovered), LOSSES) == pytest.approx(alone, rel=1e-3)
    load_student(store, recovered.student, teacher)
    assert checkpoints(store) == []
    everything_is_published(store)


def test_a_worker_is_killed_and_another_run_ends_in_nan(
    store: Store, teacher: Teacher, row: Row
) -> None:
    killer = Killer(store)
    recovered, broken = recover_tiny(store, teacher, killer)
    assert killer.killed is not None
    nothing_is_lost(store, teacher, recovered)
    assert broken.failed is not None
    assert "not finite" in broken.failed
    row("worker SIGKILLed in a step; NaN in another run", "went on from its checkpoint; NaN told")


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the workers of a local Ray, which import the tests, note their steps."""
    import ray

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "steps"
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        runtime_env=probing(folder),
    )  # fmt: skip
    yield folder
    ray.shutdown()


@dataclass
class Spoiler:
    """Spoils the loss of one step of the second phase."""

    steps: Path
    factor: float
    done: bool = False

    def update(self, done: int, total: int, **facts: float | str) -> None:
        taken = attempts(self.steps)
        if not self.done and taken and taken[-1].end >= STEPS // 2:
            spoil_a_step(self.steps, self.factor)
            self.done = True


@pytest.mark.parametrize(
    ("factor", "loss"), [(math.nan, "is not finite"), (1e4, "rises 10,000 times")]
)
def test_a_step_is_spoiled(
    store: Store, teacher: Teacher, steps: Path, row: Row, factor: float, loss: str
) -> None:
    [recovered] = recover_tiny(store, teacher, Spoiler(steps, factor), finalists=1)
    before, after = attempts(steps)
    assert before.end >= STEPS // 2
    assert 0 <= before.end - after.first <= 10  # steps between checkpoints
    assert after.end == STEPS
    assert recovered.failed is None
    # Then on at half the rate.
    losses, alone = (
        read_json(store, prefix_of(recovered), LOSSES),
        alone_losses(store, teacher, recovered),
    )
    assert losses[: after.first] == pytest.approx(alone[: after.first], rel=1e-3)
    assert len(losses) == STEPS
    assert max(losses[20:]) < 2 * max(alone[20:])
    load_student(store, recovered.student, teacher)
    assert checkpoints(store) == []
    everything_is_published(store)
    row(f"step whose loss {loss}", "back to a checkpoint, on at half the rate")


@dataclass
class SpoilsReplacement:
    """Spoils a step of some replacement, when all have taken some tens of steps."""

    steps: Path
    factor: float
    done: bool = False

    def update(self, done: int, total: int, **facts: float | str) -> None:
        if not self.done and done >= total // 2:
            spoil_a_replacement(self.steps, self.factor)
            self.done = True


@pytest.mark.parametrize(
    ("factor", "loss"), [(math.nan, "is not finite"), (1e4, "rises 10,000 times")]
)
def test_a_step_of_a_replacement_is_spoiled(
    s3_url: str,
    tmp_path: Path,
    teacher: Teacher,
    steps: Path,
    row: Row,
    factor: float,
    loss: str,
) -> None:
    alone, store = open_store(str(tmp_path / "alone")), open_store(s3_url)
    for where, progress in ((alone, None), (store, SpoilsReplacement(steps, factor))):
        put_latents(where)
        report = train_library(
            teacher, MANY, where, ENCODING, LONG, SWEEP, probe=PROBE, workers=2, progress=progress
        )
        assert report.failed == {}
        assert report.interruptions == ()
    (hit,) = report.set_back
    before, after = trained_digests(alone, teacher), trained_digests(store, teacher)
    assert {block for block in MANY if before[block] != after[block]} == {hit}
    losses = read_json(store, report.prefixes[hit], BLOCK_LOSSES)
    assert isinstance(losses, list)
    assert losses.count(None) == (1 if math.isnan(factor) else 0)
    spared = [value for value in losses if isinstance(value, float)]
    assert max(spared[20:]) < 2 * max(spared[:20])
    assert checkpoints_of_library(store) == []
    everything_is_published(store)
    done = "not taken" if math.isnan(factor) else "back to its checkpoint"
    row(f"step of a replacement whose loss {loss}", f"{done}, on at half the rate, it alone")


class Damager(Killer):
    """Turns a bit in every shard of the first checkpoint, then kills a worker that needs it."""

    def update(self, done: int, total: int, **facts: float | str) -> None:
        if self.killed is None and checkpoints(self.store):
            prefix = checkpoints(self.store)[0].rpartition("/")[0]
            for key in self.store.keys(prefix):
                if key.endswith(".safetensors"):
                    self.store.write(key, altered(self.store.read(key).read()))
        super().update(done, total, **facts)


def test_the_only_checkpoint_of_a_lost_worker_is_damaged(
    store: Store, teacher: Teacher, row: Row
) -> None:
    damager = Damager(store)
    [recovered] = recover_tiny(store, teacher, damager, finalists=1, checkpoint_every=STEPS // 2)
    assert damager.killed is not None
    nothing_is_lost(store, teacher, recovered)
    row("worker SIGKILLed, its only checkpoint altered", "started anew on an untouched student")


def test_a_library_worker_is_killed(
    s3_url: str, tmp_path: Path, teacher: Teacher, row: Row
) -> None:
    alone, store = open_store(str(tmp_path / "alone")), open_store(s3_url)
    hit = Hit(store, teacher, signal.SIGKILL)
    with local_ray():
        for where, progress in ((alone, None), (store, hit)):
            put_latents(where)
            report = train_library(
                teacher,
                MANY,
                where,
                ENCODING,
                LONG,
                SWEEP,
                probe=PROBE,
                workers=2,
                progress=progress,
            )
    assert hit.pid is not None
    assert len(report.interruptions) == 1
    assert report.interruptions[0].on_from > 0
    # To the last bit what a run that nothing happened to has trained.
    assert trained_digests(store, teacher) == trained_digests(alone, teacher)
    assert checkpoints_of_library(store) == []
    everything_is_published(store)
    row("library worker SIGKILLed in a step", "its replacements went on from their checkpoints")


def test_the_driver_is_killed_and_resumed(store: Store, teacher: Teacher, row: Row) -> None:
    command = [sys.executable, "-m", "tests.faults.tiny_recovery", store.url, str(teacher.folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        while not checkpoints(store):
            assert driver.poll() is None, "it ended before its first checkpoint"
            time.sleep(0.2)
        driver.send_signal(signal.SIGKILL)
    recovered, _ = recover_tiny(store, teacher)
    nothing_is_lost(store, teacher, recovered)
    row("driver SIGKILLed and run again", "went on from its checkpoint")

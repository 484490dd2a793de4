"""Workers that are killed, stopped or end again and again, on Ray itself: what goes on, and whether
anyone can tell by what was trained."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from storage import layout
from storage.checkpoint import Saver
from storage.errors import EspalierError
from storage.manifest import published, verify
from storage.store import Store, open_store
from tests.trainers.library.light import Does, Light, Stillborn
from tests.trainers.library.setting import (
    ENCODING,
    LONG,
    MANY,
    PROBE,
    SWEEP,
    Hit,
    checkpoints,
    put_latents,
    trained_digests,
)
from trainers.library import crew as crews
from trainers.library.config import LibraryConfig
from trainers.library.crew import Crew
from trainers.library.library import LibraryError, read_meta
from trainers.library.workers import LibraryReport, train_library
from trainers.progress import Progress
from trainers.students.plan import BlockPlan
from trainers.teacher import Teacher

pytestmark = [pytest.mark.usefixtures("ray"), pytest.mark.timeout(600)]


def train(
    store: Store, teacher: Teacher, progress: Progress | None = None, sweep: str = SWEEP
) -> LibraryReport:
    """Always on two workers: how many threads each has shows in the last bits on some machines."""
    return train_library(
        teacher, MANY, store, ENCODING, LONG, sweep, probe=PROBE, workers=2, progress=progress
    )


@pytest.fixture(scope="module")
def undisturbed(
    ray: None, teacher: Teacher, tmp_path_factory: pytest.TempPathFactory
) -> dict[BlockPlan, tuple[str, str]]:
    """What is trained when nothing happens."""
    store = open_store(str(tmp_path_factory.mktemp("undisturbed")))
    put_latents(store)
    report = train(store, teacher)
    assert report.interruptions == ()
    assert checkpoints(store) == []
    return trained_digests(store, teacher)


def test_two_sweeps_may_train_the_same_replacements_at_once(
    teacher: Teacher, undisturbed: dict[BlockPlan, tuple[str, str]], tmp_path: Path
):
    """Neither takes from the other what it has under way or stored."""
    store = open_store(str(tmp_path))
    put_latents(store)

    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda sweep: train(store, teacher, sweep=sweep), ("one", "two")))
    for report in reports:
        assert set(report.prefixes) == set(MANY)
        assert (report.interruptions, report.failed) == ((), {})
    assert trained_digests(store, teacher) == undisturbed
    for prefix in reports[0].prefixes.values():
        verify(store, prefix)
    assert checkpoints(store) == []


@pytest.mark.parametrize(
    ("sent", "why"), [(signal.SIGKILL, "was lost"), (signal.SIGSTOP, "fell behind")]
)
def test_a_lost_or_stopped_worker_costs_the_steps_since_its_checkpoints(
    teacher: Teacher,
    undisturbed: dict[BlockPlan, tuple[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    sent: signal.Signals,
    why: str,
):
    if sent == signal.SIGSTOP:
        monkeypatch.setattr(crews, "PATIENCE_SECONDS", 3.0)
    store = open_store(str(tmp_path / "store"))
    put_latents(store)
    hit = Hit(store, teacher, sent)
    report = train(store, teacher, hit)
    assert hit.pid is not None
    if psutil.pid_exists(hit.pid):
        psutil.Process(hit.pid).wait(timeout=120)

    interruption, *more = report.interruptions
    assert more == []
    assert interruption.why == why
    assert len(interruption.blocks) == 2
    assert str(interruption) in caplog.text
    assert hit.facts["interrupted"] == 1
    for block, prefix in report.prefixes.items():
        meta = read_meta(store, prefix)
        assert meta is not None
        if block in interruption.blocks:
            (step,) = meta.continued
            assert step >= max(interruption.on_from, hit.saved[block])
        else:
            assert meta.continued == ()
    # A save may have been under way when it was seen last.
    assert interruption.at - interruption.on_from < 3 * LONG.checkpoint_every

    assert trained_digests(store, teacher) == undisturbed
    assert checkpoints(store) == []


# Of the light workers below.
CONFIG = LibraryConfig(steps=10, retries=1, timeout=5.0)
BAD, *GOOD = MANY
CUT = BlockPlan(span=(0, 1), start="average")
PREFIXES = {block: layout.replacement("t", str(i)) for i, block in enumerate([*MANY, CUT])}


def light_crew(
    store: Store, does: Does, size: int = 2, actor: type = Light, config: LibraryConfig = CONFIG
) -> Crew:
    import ray

    def start() -> Any:
        made = ray.remote(actor).options(num_cpus=0.1, max_concurrency=2)
        return made.remote(store.url, does)

    return Crew(start, size, store, PREFIXES, config, SWEEP)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def run(crew: Crew) -> list[tuple[int, int, int]]:
    told: list[tuple[int, int, int]] = []
    crew.run([MANY[:2], MANY[2:]], lambda *numbers: told.append(numbers))
    return told


def stored(store: Store) -> list[BlockPlan]:
    return [block for block, prefix in PREFIXES.items() if published(store, prefix)]


def test_a_replacement_that_ends_every_worker_fails_alone_and_is_named(
    store: Store, caplog: pytest.LogCaptureFixture
):
    def does(group: Sequence[BlockPlan]) -> None:
        if BAD in group:
            os.kill(os.getpid(), signal.SIGKILL)

    saver = Saver(store, layout.library_checkpoints(PREFIXES[BAD], SWEEP))
    saver.save(4, {"w": torch.ones(1)}, None)
    saver.finish()
    crew = light_crew(store, does)
    told = run(crew)
    assert stored(store) == GOOD
    assert crew.failed == {
        BAD: "its worker ended 2 times in a row between step 4 and its next checkpoint; the last "
        "one was lost"
    }
    assert f"{BAD} failed and is left out" in caplog.text
    assert [set(i.blocks) for i in crew.interruptions] == [set(MANY[:2])]
    assert checkpoints(store) == []
    assert told[-1] == (4 * CONFIG.steps, 3, 1)


def test_one_that_ends_every_worker_that_measures_it_is_said_to(store: Store):
    def does(group: Sequence[BlockPlan]) -> None:
        raise RuntimeError("out of memory")

    crew = light_crew(store, does, size=1)
    crew.run([[CUT]], lambda *_: None)
    assert crew.failed == {
        CUT: "its worker ended 2 times in a row while it was measured; the last one failed with "
        "RuntimeError: out of memory"
    }


def test_a_group_that_is_too_much_for_a_worker_is_trained_one_by_one(store: Store):
    def does(group: Sequence[BlockPlan]) -> None:
        if len(group) > 1:
            raise RuntimeError("out of memory")

    crew = light_crew(store, does)
    run(crew)
    assert stored(store) == MANY
    assert crew.failed == {}
    assert {i.why for i in crew.interruptions} == {"failed with RuntimeError: out of memory"}


def test_what_data_or_store_are_at_fault_for_ends_the_run(store: Store):
    def does(group: Sequence[BlockPlan]) -> None:
        raise EspalierError("s3://gone: no such bucket")

    with pytest.raises(EspalierError, match="no such bucket"):
        run(light_crew(store, does))


def test_a_worker_that_hangs_is_ended_where_no_other_is_free(store: Store):
    hung = store.url + "/hung"

    def does(group: Sequence[BlockPlan]) -> None:
        if not Path(hung).exists():
            Path(hung).touch()
            threading.Event().wait()

    crew = light_crew(store, does, size=1)
    run(crew)
    assert stored(store) == MANY
    (interruption,) = crew.interruptions
    assert interruption.why.startswith("took no step for")


def test_one_that_only_measures_never_falls_behind(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crews, "PATIENCE_SECONDS", 0.0)
    begun, seen = Path(store.url, "begun"), Path(store.url, "seen")

    def does(group: Sequence[BlockPlan]) -> None:
        if CUT in group:
            begun.touch()
        until = seen if CUT in group else begun
        while not until.exists():
            time.sleep(0.05)

    told: list[tuple[int, int, int]] = []

    def report(done: int, made: int, interrupted: int) -> None:
        told.append((done, made, interrupted))
        # By now the other one is free, and this one has been held against it.
        if made == len(GOOD):
            seen.touch()

    patient = CONFIG.model_copy(update={"timeout": 300.0})
    light_crew(store, does, config=patient).run([GOOD, [CUT]], report)
    assert stored(store) == [*GOOD, CUT]
    assert told[-1] == (3 * CONFIG.steps, 4, 0)


def test_workers_that_do_not_come_up_end_the_run(store: Store):
    with pytest.raises(LibraryError, match="2 workers in a row ended before they had loaded"):
        run(light_crew(store, lambda _: None, actor=Stillborn))

"""The soak itself: it sees what must not happen, and a few random faults cost nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from storage.manifest import publish
from storage.store import open_store
from tests.faults.conftest import Row
from tests.faults.proxy import Proxy
from tests.faults.soak import Scene, SoakError, Tally, count_lost, scenery, soak, whole

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """One with a store and nothing else."""
    store, nothing = open_store(str(tmp_path / "store")), Proxy("")
    made = Scene(store, store.url, nothing, None, tmp_path, random.Random(0), Tally())
    made.steps.mkdir()
    return made


def attempt(scene: Scene, began: float, first: int, end: int) -> None:
    steps = "".join(f"{step}\n" for step in range(first, end))
    (scene.steps / f"{began:.6f}-2-1.txt").write_text(steps)


def test_it_sees_what_is_published_and_not_whole(scene: Scene) -> None:
    publish(scene.store, "a", {"x": b"1", "y": b"2"})
    assert whole(scene) == {"a"}
    scene.store.remove("a/y")
    with pytest.raises(SoakError, match="half published"):
        whole(scene)


@pytest.mark.parametrize(
    ("fault", "again", "fine"),
    [
        ("worker killed", 20, True),
        ("worker killed", 21, False),
        ("newest checkpoint damaged, worker killed", 30, True),
        ("newest checkpoint damaged, worker killed", 31, False),
        ("worker told to go", 0, True),
        ("worker told to go", 1, False),
    ],
)
def test_it_sees_more_steps_lost_than_a_fault_may_cost(
    scene: Scene, fault: str, again: int, fine: bool
) -> None:
    attempt(scene, 1.0, 0, 45)
    attempt(scene, 3.0, 45 - again, 100)
    scene.struck.append((2.0, fault))
    if fine:
        count_lost(scene)
    else:
        with pytest.raises(SoakError, match=f"{again} steps were taken again"):
            count_lost(scene)
    assert scene.tally.lost == [again]


def test_some_random_faults_cost_nothing(tmp_path: Path, row: Row) -> None:
    with scenery(tmp_path, seed=4) as made:
        soak(made, lambda tally: sum(tally.faults.values()) < 4, print)
        found: dict[str, Any] = made.tally.document()
    assert found["completed"] >= 1
    assert found["lost_objects"] == 0
    row(
        f"{sum(found['faults'].values())} random faults on a sweep",
        f"ended alike after {found['lost_steps']} steps taken again",
    )

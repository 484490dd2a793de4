"""What a worker may ask of a cluster."""

from __future__ import annotations

import pytest
import ray

from trainers.placement import PlacementError, Share, room_for, share_of


@pytest.fixture
def three_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines of 16 and 12 processors are there, and a third has gone."""
    machines = [
        {
            "Alive": n < 2,
            "Resources": {"CPU": (16.0, 12.0, 64.0)[n], "memory": (64.0, 48.0, 512.0)[n]},
        }
        for n in range(3)
    ]
    monkeypatch.setattr(ray, "nodes", lambda: machines)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 28.0})


@pytest.mark.parametrize(("workers", "threads"), [(1, 16), (2, 14), (4, 7), (40, 1)])
def test_no_share_is_larger_than_a_machine(
    three_machines: None, workers: int, threads: int
) -> None:
    assert share_of(workers, "cpu") == Share(min(1.0, 28 / workers) / 2, 0, threads, "cpu")


@pytest.mark.parametrize(("memory", "workers"), [(64, 1), (33, 2), (32, 3), (24, 4), (65, 0)])
def test_a_worker_has_its_memory_in_one_machine(
    three_machines: None, memory: int, workers: int
) -> None:
    assert room_for(workers, memory)
    assert not room_for(workers + 1, memory)


@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
@pytest.mark.parametrize("workers", [1, 2, 3, 6, 7, 12, 60])
def test_all_workers_find_room_on_the_gpus(
    monkeypatch: pytest.MonkeyPatch, workers: int, gpus: int
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": float(gpus)})
    share = share_of(workers, "gpu").num_gpus
    beside = int(10_000 // round(10_000 * share))  # Ray counts in ten-thousandths
    assert share <= 1
    assert beside * gpus >= workers


def test_a_cluster_without_gpus_is_named(three_machines: None) -> None:
    with pytest.raises(PlacementError, match="no machine of the Ray cluster offers a GPU"):
        share_of(1, "gpu")

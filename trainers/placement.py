"""A worker's share of the Ray cluster."""

from __future__ import annotations

import functools
import gc
import math
from dataclasses import dataclass
from typing import Literal

from storage.errors import EspalierError

Accelerator = Literal["cpu", "gpu"]


class PlacementError(EspalierError):
    """Work that the cluster has no room for."""


@dataclass(frozen=True)
class Share:
    """What one of several equal workers asks Ray for, and how many threads it may run."""

    num_cpus: float
    num_gpus: float
    threads: int
    device: Literal["cpu", "cuda"]

    def prepare(self) -> None:
        """Called first in the worker: Ray places processes, it does not limit their threads."""
        import_models()
        import torch

        torch.set_num_threads(self.threads)


@functools.cache
def import_models() -> None:
    """Imports the libraries of models, in a process that is there to run one.

    All they make stays. To look for garbage among it took Python a quarter of the import, and a
    quarter of a second at every full collection after it.
    """
    gc.disable()
    try:
        import diffusers.models.transformers  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def room_for(workers: int, memory: int) -> bool:
    """Whether the running cluster's machines hold so many workers, each of which needs `memory`
    bytes of its machine's own memory."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(int(machine.get("memory", 0.0)) // memory for machine in machines) >= workers


def share_of(workers: int, accelerator: Accelerator) -> Share:
    """An equal share for each of `workers` processes of the running cluster.

    Half of what a worker will use is asked of Ray, so that tasks that only read or watch always
    find room beside it. No share is larger than a machine. Several workers may share a GPU. Raises
    PlacementError without one.
    """
    import ray

    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 1.0), resources.get("GPU", 0.0)
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = int(max(machine.get("CPU", 0.0) for machine in machines))
    if accelerator == "gpu" and gpus == 0:
        raise PlacementError(
            "accelerator: gpu, but no machine of the Ray cluster offers a GPU; add one or set "
            "accelerator: cpu"
        )
    return Share(
        num_cpus=round(min(1.0, cpus / workers) / 2, 3),
        # Rounded down, as many to every GPU: or the last worker would wait for ever.
        num_gpus=10_000 // math.ceil(workers / gpus) / 10_000 if accelerator == "gpu" else 0,
        threads=max(1, min(int(cpus) // workers, largest)),
        device="cuda" if accelerator == "gpu" else "cpu",
    )

"""Runs one piece of a stage where models run: here on CPUs, as a Ray task on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from search.sweep import Sweep
from storage.store import Store, StoreOptions, open_store
from trainers.progress import Progress, silent


class Site:
    """Where a piece of work finds itself; what it needs beside its arguments."""

    def __init__(self, store: Store, device: str, progress: Progress) -> None:
        self.store, self.device, self.progress = store, device, progress


def place(
    sweep: Sweep,
    work: Callable[..., None],
    progress: Progress,
    *,
    memory: int = 0,
    **arguments: Any,
) -> None:
    """Calls `work(site, **arguments)`, which leaves what it makes in the store.

    On CPUs in this process, with all its threads: a worker would only start up beside it. With
    `accelerator: gpu` on whichever machine has a GPU, because this one may have none, and `memory`
    bytes beside it; progress is not carried from there.
    """
    if sweep.config.accelerator == "cpu":
        work(Site(sweep.store, "cpu", progress), **arguments)
        return
    import ray

    # One call a process: an idle one would keep the GPU's memory, which Ray gives to the next.
    remote = ray.remote(num_gpus=1, memory=memory, max_calls=1)(_remotely)
    ray.get(remote.remote(work, sweep.store.url, sweep.config.store, arguments))


def _remotely(
    work: Callable[..., None], url: str, options: StoreOptions, arguments: dict[str, Any]
) -> None:
    work(Site(open_store(url, options, patient=True), "cuda", silent()), **arguments)

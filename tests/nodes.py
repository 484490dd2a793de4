"""Several machines of a Ray cluster, all of them this one, which come and go."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@contextmanager
def machines(head_cpus: int, **arguments: Any) -> Iterator[Any]:
    """A cluster of one machine, joined with `ray.init(**arguments)` and ended with the block.

    Workers find the tests by their path, as the tests themselves are found: PYTHONPATH must hold
    ROOT.
    """
    import ray

    with _cluster(head_cpus) as started:
        ray.init(address=started.address, log_to_driver=False, logging_level="ERROR", **arguments)
        try:
            yield started
        finally:
            ray.shutdown()


@contextmanager
def head_and_one(cpus: int) -> Iterator[Any]:
    """A cluster that this process does not join: a head without room, and one machine."""
    with _cluster(0) as started:
        started.add_node(num_cpus=cpus)
        yield started


@contextmanager
def _cluster(head_cpus: int) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    from cluster.connect import prepare_environment

    prepare_environment()
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": head_cpus})
    try:
        yield started
    finally:
        started.shutdown()


@dataclass(frozen=True)
class Machine:
    """One that joined by `ray start --block`, as a scheduler starts it."""

    process: subprocess.Popen[bytes]

    def terminate(self) -> None:
        """What a scheduler does first when it wants the machine back."""
        self.process.terminate()

    def wait(self, seconds: float) -> None:
        self.process.wait(seconds)


@contextmanager
def joined(cluster: Any, cpus: int, grace: float, log: Path) -> Iterator[Machine]:
    """A machine of the cluster which, told to end, does so after `grace` seconds at most."""
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
        "--address", cluster.address, "--num-cpus", str(cpus), "--num-gpus", "0",
        "--object-store-memory", str(150 * 2**20),
        "--min-worker-port", "0", "--max-worker-port", "0", "--dashboard-agent-listen-port", "0",
    ]  # fmt: skip
    known = alive()
    environment = {**os.environ, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(grace)}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        _wait_until(known + 1, process, log)
        yield Machine(process)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace + 30)
        process.kill()
        process.wait()


def alive() -> int:
    """How many machines the cluster has."""
    import ray

    return sum(node["Alive"] for node in ray.nodes())


def _wait_until(count: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while alive() < count:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the machine did not join:\n{log.read_text()}")
        time.sleep(0.2)

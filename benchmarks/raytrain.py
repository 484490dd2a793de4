"""Training under Ray Train against the same loop under torchrun, in one run.

Both train at once, by turns: while one does, every process of the other is stopped, Ray's own among
them, so that both meet the same machine and each pays for all that it starts. Once with a worker on
every core, where whatever Ray computes is the training's loss; then with two that train on one
core, and with one worker, as on a machine whose GPUs leave cores over. Called by benchmarks.train.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import torch.distributed

from benchmarks.train import SMALL, Row, built, drawn, halved, phases
from trainers.desk import Desk, Line
from trainers.estimate import Pictures
from trainers.optimizer import make_optimizer, set_rate
from trainers.recovery import set_trainable, train_step
from trainers.schedule import PLAIN
from trainers.sharded import shard

_BATCH = 4
"""Of each worker."""
WARM = 5
EVERY = 5
"""Steps between reports, as in a recovery of 100, unless less than a second has gone."""
_START_SECONDS = 300.0


class Job(NamedTuple):
    """What both sides do."""

    workers: int
    one_core: bool
    """Whether all of them train on the first core, which leaves the others to the rest."""


class Side:
    """A process, with all that it has started, which trains and notes when each step ended."""

    def __init__(self, name: str, job: Job, folder: Path) -> None:
        self.notes = folder / name
        asked = json.dumps({"notes": str(self.notes), **job._asdict()})
        program = [sys.executable, "-m", "benchmarks.raytrain", asked]
        if name == "torchrun":
            ranks = f"--nproc_per_node={job.workers}"
            program[2:2] = ["torch.distributed.run", "--standalone", ranks, "-m"]
        log = (folder / f"{name}.log").open("wb")
        # Ray's workers are at niceness 15 unless told, which beside others' work would be unequal.
        environment = {**os.environ, "RAY_worker_niceness": "0"}
        self._process = psutil.Popen(program, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self._log = Path(log.name)
        self._family: set[psutil.Process] = set()
        self._turns: list[tuple[float, float]] = []
        self._computing: list[float] = []

    def warm(self) -> None:
        """Wait for its first steps."""
        deadline = time.monotonic() + _START_SECONDS
        while len(self._ends()) < WARM:
            self._each(lambda process: None)
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"does not train:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.1)

    def take_turn(self, seconds: float) -> None:
        computed, begun = self._computed(), time.monotonic()
        self._each(psutil.Process.resume)
        time.sleep(seconds)
        self.stop()
        self._turns.append((begun, time.monotonic()))
        self._computing.append(self._computed() - computed)

    def stop(self) -> None:
        self._each(psutil.Process.suspend)

    def kill(self) -> None:
        self._each(psutil.Process.kill)
        self._process.wait()

    def rates(self) -> list[float]:
        """Steps a second of each turn."""
        lengths = [end - begun for begun, end in self._turns]
        return list(np.divide(steps_by_turn(self._ends(), self._turns), lengths))

    def computed(self) -> list[float]:
        """Seconds of cores that a step took in each turn, of all its processes together."""
        return list(np.divide(self._computing, steps_by_turn(self._ends(), self._turns)))

    def _computed(self) -> float:
        total = 0.0

        def add(process: psutil.Process) -> None:
            nonlocal total
            total += sum(process.cpu_times()[:2])

        self._each(add)
        return total

    def _ends(self) -> list[float]:
        lines = self.notes.read_text().split("\n")[:-1] if self.notes.exists() else []
        return [float(line) for line in lines]

    def _each(self, act: Callable[[psutil.Process], None]) -> None:
        with suppress(psutil.NoSuchProcess):
            self._family |= {self._process, *self._process.children(recursive=True)}
        for process in self._family:
            with suppress(psutil.NoSuchProcess):
                act(process)


def steps_by_turn(ends: Sequence[float], turns: Sequence[tuple[float, float]]) -> list[float]:
    """How many steps were taken in each turn, by when they ended; one that a pause cut in two
    counts in both turns, by its parts."""
    edges = np.cumsum([0.0, *(end - begun for begun, end in turns)])
    # The time that it trained until each step's end, pauses left out.
    active = np.interp(ends, np.ravel(turns), np.repeat(edges, 2)[1:-1])
    return list(np.diff(np.interp(edges, active, np.arange(len(active)))))


def ray_row(job: Job, turns: int, seconds: float) -> Row:
    """Rates over all the time of a turn, reports among it; medians of the turns, and of the ratios
    of neighbouring ones. The first pair is left out. The ratio of core seconds is what that of the
    rates comes to on full cores, and does not see what else the machine does."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as ended:
        sides = {name_: Side(name_, job, Path(name)) for name_ in ("torchrun", "ray")}
        for side in sides.values():
            ended.callback(side.kill)
        for side in sides.values():
            side.warm()
        for side in sides.values():
            side.stop()
        for _ in range(1 + turns):
            for side in sides.values():
                side.take_turn(seconds)
        bare, ray = (side.rates()[1:] for side in sides.values())
        bare_took, ray_took = (sum(side.computed()[1:]) / turns for side in sides.values())
    ratios = [b / a for a, b in zip(bare, ray, strict=True)]
    return {
        "part": "ray",
        **job._asdict(),
        "turns": turns,
        "seconds": seconds,
        "torchrun_steps_per_s": round(statistics.median(bare), 2),
        "ray_steps_per_s": round(statistics.median(ray), 2),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 3),
        "core_seconds_a_step": [round(bare_took, 3), round(ray_took, 3)],
        "ratio_of_core_seconds": round(bare_took / ray_took, 3),
        "ratio_of_all_steps": round(sum(ray) / sum(bare), 3),
    }


def training() -> Iterator[Row]:
    """Steps of a sharded whole-model phase, without end; what each would report."""
    torch.set_num_threads(1)
    world = torch.distributed.get_world_size()
    phase = phases(batch=_BATCH * world)[1]
    student, teacher = built(SMALL, halved(12), PLAIN)
    shard(student, torch.device("cpu"), torch.float32)
    set_trainable(student, phase)
    optimizer = make_optimizer("adamw", student.parameters(), phase.lr)
    set_rate(optimizer, phase.lr)
    example = drawn(SMALL, Pictures(64, 16), _BATCH)
    step = 0
    while True:
        loss = train_step(student, teacher, example, phase, optimizer, mean)
        step += 1
        yield {"step": step, "loss": loss}


def mean(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / torch.distributed.get_world_size()


def work(notes: str, one_core: bool, report: Callable[[Row], None]) -> None:
    """What a worker of either side does."""
    if one_core:
        os.sched_setaffinity(0, {0})  # this thread, which trains, alone
    first = torch.distributed.get_rank() == 0
    with open(notes if first else os.devnull, "w", buffering=1) as stream:
        for facts in training():
            if facts["step"] % EVERY == 0:
                report(facts)
            print(time.monotonic(), file=stream)


def ray_worker(config: dict[str, Any]) -> None:
    tell = Line(config["desk"], torch.distributed.get_rank()).tell
    work(config["notes"], config["one_core"], tell)


def under_ray(notes: str, workers: int, one_core: bool) -> None:
    """Train as a recovery does."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from cluster.connect import LOCAL
    from search.racing import TRAIN_ENVIRONMENT

    os.environ.update(TRAIN_ENVIRONMENT | LOCAL)
    ray.init("local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    TorchTrainer(
        ray_worker,
        train_loop_config={
            "notes": notes,
            "one_core": one_core,
            "desk": ray.remote(num_cpus=0)(Desk).remote(),
        },
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(name="benchmark", storage_path=str(Path(notes).parent)),
    ).fit()


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    if "RANK" in os.environ:  # under torchrun
        torch.distributed.init_process_group("gloo")
        work(asked["notes"], asked["one_core"], lambda facts: None)
    else:
        under_ray(**asked)

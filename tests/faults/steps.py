"""Notes every optimizer step that any process takes, so that steps taken twice can be counted,
spoils the loss of one when asked to, and lets workers wait until there are more.

A probe of the tests in Ray's own workers: `ray.init(runtime_env=probing(folder))`. And the command
with its workers probed, on the cluster of RAY_ADDRESS:

    ESPALIER_TEST_STEPS=folder python -m tests.faults.steps sweep config.yaml
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = "ESPALIER_TEST_STEPS"
_SPOIL = "spoil"
_SPOIL_LIBRARY = "spoil-library"
_HOLD = "hold"


def probing(folder: Path) -> dict[str, Any]:
    """The runtime environment in which workers note their steps in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    hook = "tests.faults.steps.note_steps"
    return {"worker_process_setup_hook": hook, "env_vars": {FOLDER: str(folder)}}


def note_steps() -> None:
    """Called by Ray in each of its processes before anything else."""
    import torch.distributed

    from trainers import recovery
    from trainers.library import train as library

    taken, stepped = recovery.recover, recovery.train_step
    names = (_SPOIL, _SPOIL_LIBRARY, _HOLD)
    spoil, spoil_library, hold = (Path(os.environ[FOLDER]) / name for name in names)
    replaced = library._backward

    def train_step(student: Any, teacher: Any, example: Any, phase: Any, *rest: Any) -> float:
        optimizer, mean = rest
        if spoil.exists() and torch.distributed.get_rank() == 0:
            factor = float(spoil.read_text())
            spoil.unlink()
            return stepped(student, teacher, example, phase, optimizer, lambda v: mean(v * factor))
        return stepped(student, teacher, example, phase, optimizer, mean)

    def recover(
        student: Any, teacher: Any, examples: Any, schedule: Any, at: Any, **rest: Any
    ) -> None:
        told = rest.pop("report")
        world = torch.distributed.get_world_size()
        name = f"{time.time():.6f}-{world}-{os.getpid()}.txt"
        with (Path(os.environ[FOLDER]) / name).open("w", buffering=1) as file:

            def report(at: Any, loss: float) -> None:
                told(at, loss)
                if torch.distributed.get_rank() == 0:
                    file.write(f"{at.done(schedule)}\n")
                while hold.exists() and world < int(hold.read_text()):
                    time.sleep(0.05)  # until they are ended

            taken(student, teacher, examples, schedule, at, report=report, **rest)

    def backward(*arguments: Any, **named: Any) -> Any:
        loss = replaced(*arguments, **named)
        mine = spoil_library.with_suffix(f".{os.getpid()}")
        try:
            spoil_library.rename(mine)  # the first of the workers to see it
        except FileNotFoundError:
            return loss
        return loss * float(mine.read_text())

    recovery.recover, recovery.train_step = recover, train_step
    library._backward = backward


def spoil_a_step(folder: Path, factor: float) -> None:
    """The loss of the next step that a first rank takes is so many times what it was."""
    _say(folder / _SPOIL, str(factor))


def spoil_a_replacement(folder: Path, factor: float) -> None:
    """The loss of the next step of any replacement is so many times what it was."""
    _say(folder / _SPOIL_LIBRARY, str(factor))


def hold_steps(folder: Path, workers: int) -> None:
    """Fewer workers than these take no step any more."""
    _say(folder / _HOLD, str(workers))


def _say(file: Path, text: str) -> None:
    whole = file.with_suffix(".new")
    whole.write_text(text)
    whole.replace(file)


@dataclass(frozen=True)
class Attempt:
    """Steps that the workers of one start took, from `first` to before `end`."""

    began: float
    """Seconds since the epoch."""
    workers: int
    first: int
    end: int


def attempts(folder: Path) -> list[Attempt]:
    """Those that took a step, in their order."""
    found = []
    for file in sorted(folder.glob("*.txt")):
        steps = [int(line) for line in file.read_text().split()]
        if steps:
            began, workers, _ = file.name.split("-")
            found.append(Attempt(float(began), int(workers), steps[0], steps[-1] + 1))
    return found


def lost(found: list[Attempt]) -> list[int]:
    """How many steps were taken again after each attempt but the last."""
    return [max(0, one.end - after.first) for one, after in itertools.pairwise(found)]


def main() -> None:
    """The command, with what its Ray cluster runs probed."""
    import ray

    from cluster.cli.main import main as command

    init, mine = ray.init, probing(Path(os.environ[FOLDER]))

    def probed(**arguments: Any) -> Any:
        given = arguments.get("runtime_env", {})
        variables = {**given.get("env_vars", {}), **mine["env_vars"]}
        return init(**{**arguments, "runtime_env": {**mine, "env_vars": variables}})

    ray.init = probed
    command()


if __name__ == "__main__":
    main()

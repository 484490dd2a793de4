"""Random faults for a while: a real sweep that recovers and publishes over and over, on a cluster
whose machine comes and goes, into a real S3 server behind the proxy.

    python -m tests.faults.soak --minutes 30 --seed 0 --out build/soak

One sweep runs without faults. Then its recovery and publication are done anew, again and again,
while workers, drivers, machines, checkpoints and answers of the store are broken. Each time they
end, the student must be the first one, bit for bit, the store must hold nothing else than it did,
and `espalier best verify` must pass. A step that is not finite changes what is learned, since
recovery answers it with a lower rate: such a run must only end as whole as the others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from storage.errors import DamagedError, MissingKey
from storage.garbage import find_garbage
from storage.manifest import MANIFEST, published, read_json, verify
from storage.store import Store, StoreOptions, open_store
from tests.cluster.test_end_to_end import COMMAND, TINY
from tests.conftest import make_tiny_pipeline
from tests.faults.proxy import Answer, Fault, Proxy, Request, proxying
from tests.faults.steps import FOLDER, attempts, spoil_a_step
from tests.nodes import ROOT, head_and_one
from tests.s3 import environment, serving
from trainers.worker import LOSSES, open_student

NAME, LABEL = "tiny", "75pct"
EVERY = 10
"""Steps between checkpoints."""
STEPS = 200
CONFIG: dict[str, Any] = {
    **TINY,
    "budgets": ["75%"],
    # Given, since what is soaked comes after the search.
    "plan": {
        "family": "qwen_image", "teacher_blocks": 6,
        "blocks": [{"span": [0, 0]}, {"span": [1, 2], "start": "library"}, {"span": [3, 3]},
                   {"span": [4, 5], "start": "library"}],
    },
    "workers": 1,
    "store": {"timeout": 3},
    "recover": {
        "schedules": 1,
        "checkpoint_every": EVERY,
        "retries": 1000,  # they say how many faults are borne, and here they do not end
        "step": {"rollbacks": 1000, "spike": None},
        "space": {
            "phases": [
                {"loss": "span", "steps": 50, "lr": 0.001, "batch_size": 4},
                {"loss": "velocity", "train": "all", "steps": STEPS - 50, "lr": 0.001,
                 "batch_size": 4},
            ]
        },
    },
}  # fmt: skip
AGAIN = (f"sweeps/{NAME}/recovery", f"sweeps/{NAME}/judged", f"sweeps/{NAME}/report",
         f"sweeps/{NAME}/stages/recover", f"sweeps/{NAME}/stages/publish",
         f"sweeps/{NAME}/stages/report", "models", "best", "registry")  # fmt: skip
"""What a run makes anew; all else is made once and must stay."""

_ERRORS: list[Fault] = [
    Answer(500, "InternalError"), Answer(503, "SlowDown"), "hang", "reset", "reset after",
    "cut answer",
]  # fmt: skip
_BETWEEN = (5, 60)
"""Steps between faults."""
_STUCK_SECONDS = 600.0
_FAILURES = 5


class SoakError(AssertionError):
    """What must never happen."""


@dataclass
class Tally:
    """What happened."""

    began: float | None = None
    """When, by the monotonic clock, the first run had ended."""
    faults: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    """That the proxy broke."""
    restarts: Counter[str] = field(default_factory=Counter)
    """Of the sweep by us, of the workers by Ray Train."""
    completed: int = 0
    alike: int = 0
    """Of the completed, those held against the first run."""
    lost: list[int] = field(default_factory=list)
    """Steps that were taken again, by restart of the workers."""
    lost_objects: int = 0
    failures: list[str] = field(default_factory=list)
    """How sweeps ended that nobody had killed."""

    def document(self) -> dict[str, Any]:
        return {
            "faults": dict(self.faults), "broken_requests": self.requests,
            "restarts": dict(self.restarts), "completed": self.completed, "alike": self.alike,
            "lost_steps": sum(self.lost), "most_lost_steps": max(self.lost, default=0),
            "checkpoint_every": EVERY, "lost_objects": self.lost_objects,
            "failures": self.failures,
        }  # fmt: skip


@dataclass
class Scene:
    """Where it plays."""

    store: Store
    """Past the proxy."""
    through: str
    """The URL, which leads through the proxy."""
    proxy: Proxy
    cluster: Any
    folder: Path
    chance: random.Random
    tally: Tally
    driver: subprocess.Popen[bytes] | None = None
    runs: int = 0
    damaged: set[str] = field(default_factory=set)
    """Checkpoints that we have damaged."""
    spoiled: bool = False
    """Whether a step of this run was not finite."""
    struck: list[tuple[float, str]] = field(default_factory=list)
    """When which fault came, of this run."""

    @property
    def steps(self) -> Path:
        return self.folder / f"steps-{self.runs}"

    def start(self) -> None:
        self.steps.mkdir(exist_ok=True)
        with (self.folder / "driver.log").open("wb") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.steps", "sweep",
                 str(self.folder / "sweep.yaml"), "--json"],
                cwd=ROOT, stdout=log, stderr=log,
                env={**os.environ, FOLDER: str(self.steps), "RAY_ADDRESS": self.cluster.address},
            )  # fmt: skip

    def taken(self) -> int:
        """Steps of this run, those taken twice included."""
        return sum(attempt.end - attempt.first for attempt in attempts(self.steps))

    def workers(self) -> list[psutil.Process]:
        found = []
        for node in self.cluster.list_all_nodes():
            for raylet in node.all_processes.get("raylet", []):
                for process in psutil.Process(raylet.process.pid).children(recursive=True):
                    try:
                        if "RayTrainWorker" in " ".join(process.cmdline()):
                            found.append(process)
                    except psutil.Error:
                        continue
        return found

    def checkpoints(self) -> list[str]:
        keys = self.store.keys(f"sweeps/{NAME}/recovery")
        found = (key.rpartition("/") for key in keys if "/checkpoints/step-" in key)
        return sorted({prefix for prefix, _, name in found if name == MANIFEST})


def kill_a_worker(scene: Scene) -> bool:
    return _signal_a_worker(scene, signal.SIGKILL)


def tell_a_worker(scene: Scene) -> bool:
    return _signal_a_worker(scene, signal.SIGTERM)


def kill_the_driver(scene: Scene) -> bool:
    assert scene.driver is not None
    scene.driver.kill()
    scene.driver.wait()
    scene.driver = None
    return True


def lose_the_machine(scene: Scene) -> bool:
    """Another comes only when it has gone."""
    (node,) = scene.cluster.worker_nodes
    scene.cluster.remove_node(node, allow_graceful=False)
    scene.cluster.add_node(num_cpus=2)
    return True


def break_the_store(scene: Scene) -> bool:
    """A part of all requests fails for some seconds."""
    part, lock = scene.chance.uniform(0.1, 0.4), threading.Lock()
    chance = random.Random(scene.chance.random())

    def rule(request: Request) -> Fault | None:
        with lock:
            return chance.choice(_ERRORS) if chance.random() < part else None

    scene.proxy.rule = rule
    time.sleep(scene.chance.uniform(2, 6))
    scene.proxy.rule = lambda request: None
    return True


def damage_the_newest_checkpoint(scene: Scene) -> bool:
    """And kill a worker, so that it is needed."""
    whole = scene.checkpoints()
    if len(whole) < 2 or scene.damaged & set(whole):
        return False
    prefix = whole[-1]
    files = [k for k in scene.store.keys(prefix) if not k.endswith(MANIFEST)]
    try:
        name = scene.chance.choice(files)
        content = bytearray(scene.store.read(name).read())
    except (IndexError, MissingKey):
        return False  # withdrawn meanwhile
    content[scene.chance.randrange(len(content))] ^= 1 << scene.chance.randrange(8)
    scene.damaged.add(prefix)
    scene.store.write(name, bytes(content))
    if f"{prefix}/{MANIFEST}" not in set(scene.store.keys(prefix)):
        scene.store.remove(name)  # withdrawn meanwhile
    return _signal_a_worker(scene, signal.SIGKILL)


def spoil(scene: Scene) -> bool:
    spoil_a_step(scene.steps, math.nan)
    scene.spoiled = True
    return True


FAULTS: dict[str, tuple[int, Callable[[Scene], bool]]] = {
    "worker killed": (4, kill_a_worker),
    "worker told to go": (3, tell_a_worker),
    "driver killed": (3, kill_the_driver),
    "store fails for seconds": (4, break_the_store),
    "newest checkpoint damaged, worker killed": (3, damage_the_newest_checkpoint),
    "machine lost, another comes": (2, lose_the_machine),
    "step not finite": (1, spoil),
}
"""By name, how often against the others, and what does it. False: there was nothing to break."""

_WHILE_PUBLISHING = ["driver killed", "store fails for seconds"]


def _signal_a_worker(scene: Scene, number: signal.Signals) -> bool:
    found = scene.workers()
    if not found:
        return False
    try:
        scene.chance.choice(sorted(found, key=lambda p: p.pid)).send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True


def whole(scene: Scene) -> set[str]:
    """What is published; SoakError when some of it is not as it was published."""
    found = set()
    for key in scene.store.keys(""):
        prefix, _, name = key.rpartition("/")
        if name != MANIFEST or prefix in scene.damaged:
            continue
        try:
            verify(scene.store, prefix)
            found.add(prefix)
        except (DamagedError, MissingKey) as error:
            # Checkpoints are withdrawn while we look.
            if published(scene.store, prefix) is not None:
                raise SoakError(f"half published: {error}") from error
    return found


@dataclass(frozen=True)
class Result:
    """What a run made."""

    prefix: str
    fidelity: float
    losses: list[float]
    weights: dict[str, torch.Tensor]


def result(store: Store) -> Result:
    record = published(store, f"sweeps/{NAME}/stages/recover")
    if record is None:
        raise SoakError("the sweep has ended, and its recovery is not recorded")
    facts: Any = record.meta["facts"]
    (recovery,) = facts["recoveries"]
    student, _ = open_student(store, recovery["student"])
    weights = {name: torch.empty_like(t, device="cpu") for name, t in student.like().items()}
    student.fill(weights)
    after = recovery["student"].rpartition("/")[0] + f"/after-{STEPS:06d}"
    losses: Any = read_json(store, after, LOSSES)
    return Result(recovery["student"], recovery["fidelity_loss"], losses, weights)


def check_completed(scene: Scene, first: Result | None, kept: set[str]) -> Result:
    """What must hold when a run has ended; `kept` is what it must not have touched."""
    store, made = scene.store, result(scene.store)
    if len(made.losses) != STEPS:
        raise SoakError(f"{len(made.losses)} losses of {STEPS} steps")
    if not all(bool(torch.isfinite(t).all()) for t in made.weights.values()):
        raise SoakError("weights that are not finite")
    if first is not None and not scene.spoiled:
        if made.losses != first.losses:
            pairs = zip(made.losses, first.losses, strict=True)
            at = next(i for i, (one, other) in enumerate(pairs) if one != other)
            raise SoakError(f"other losses than the first run's from step {at}")
        if made.fidelity != first.fidelity:
            raise SoakError(f"fidelity loss {made.fidelity}, not {first.fidelity}")
        for name, weight in first.weights.items():
            if not torch.equal(weight, made.weights[name]):
                raise SoakError(f"{name}: other weights than the first run's")
        scene.tally.alike += 1
    there = whole(scene)
    gone = kept - there
    scene.tally.lost_objects += len(gone)
    if gone:
        raise SoakError(f"lost: {sorted(gone)}")
    left = [*find_garbage(store, 0)]
    if left:
        raise SoakError(f"left over: {[(g.kind, g.prefix) for g in left]}")
    command = [*COMMAND, "best", "verify", LABEL, "--storage", store.url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SoakError(f"espalier best verify: {done.stderr[-2000:]}")
    return made


def count_lost(scene: Scene) -> None:
    """Adds the steps that this run took again; SoakError for more than a fault may cost."""
    taken = attempts(scene.steps)
    for one, after in itertools.pairwise(taken):
        between = [what for when, what in scene.struck if one.began < when <= after.began]
        again = max(0, one.end - after.first)
        # A checkpoint may be on its way while the steps up to the next one are taken.
        allowed = 2 * EVERY + EVERY * sum("damaged" in what for what in between)
        if between and set(between) <= {"worker told to go"}:
            allowed = 0
        scene.tally.restarts["workers"] += 1
        scene.tally.lost.append(again)
        if again > allowed:
            raise SoakError(f"{again} steps were taken again after {between}, {allowed} may be")


def begin_anew(scene: Scene) -> None:
    for prefix in AGAIN:
        for key in scene.store.keys(prefix):
            scene.store.remove(key)
    scene.runs += 1
    scene.spoiled = False
    scene.struck.clear()
    scene.damaged.clear()


def ended(scene: Scene) -> bool:
    """Whether the sweep has come through; starts it again when it has failed or was killed."""
    if scene.driver is None:
        scene.tally.restarts["sweep"] += 1
        scene.start()
        return False
    code = scene.driver.poll()
    if code is None:
        return False
    scene.driver = None
    if code == 0:
        return True
    scene.tally.failures.append((scene.folder / "driver.log").read_text()[-1500:])
    if len(scene.tally.failures) > _FAILURES:
        raise SoakError(f"the sweep has failed {_FAILURES + 1} times: {scene.tally.failures[-1]}")
    return False


def soak(scene: Scene, go_on: Callable[[Tally], bool], say: Callable[[str], None]) -> None:
    """Runs the sweep over and over, breaking something now and then, while `go_on`; ends with a
    run that comes through. SoakError for whatever must never happen."""
    scene.start()
    first = check_completed(_run_through(scene), None, set())
    kept = {prefix for prefix in whole(scene) if not prefix.startswith(AGAIN)}
    say(f"the first run: fidelity loss {first.fidelity:.6g}")
    scene.tally.began = time.monotonic()
    while go_on(scene.tally):
        begin_anew(scene)
        scene.start()
        _break_until_it_ends(scene, go_on, say)
        check_completed(scene, first, kept)
        count_lost(scene)
        scene.tally.completed += 1
        say(f"run {scene.runs} has ended as it must, after {len(scene.struck)} faults")


def _break_until_it_ends(
    scene: Scene, go_on: Callable[[Tally], bool], say: Callable[[str], None]
) -> None:
    """A fault comes after a random number of steps, and sometimes one more while the sweep
    publishes."""
    seen, wait = 0, scene.chance.randint(*_BETWEEN)
    late = scene.chance.random() < 0.5
    stirred, since = (0, 0), time.monotonic()
    while not ended(scene):
        time.sleep(0.2)
        taken = scene.taken()
        now = (taken, (scene.folder / "driver.log").stat().st_size)
        if now != stirred:
            stirred, since = now, time.monotonic()
        if time.monotonic() - since > _STUCK_SECONDS:
            raise SoakError(f"nothing has happened for {_STUCK_SECONDS:.0f} s")
        if scene.driver is None or not go_on(scene.tally):
            continue
        publishing = taken >= STEPS and late and bool(_recovered(scene))
        if not publishing and taken - seen < wait:
            continue
        names = _WHILE_PUBLISHING if publishing else [*FAULTS]
        (name,) = scene.chance.choices(names, [FAULTS[name][0] for name in names])
        when = time.time()
        if FAULTS[name][1](scene):
            scene.struck.append((when, name))
            scene.tally.faults[name] += 1
            say(f"run {scene.runs}, {taken} steps{', publishing' * publishing}: {name}")
            whole(scene)
        late = late and not publishing
        scene.tally.requests = len(scene.proxy.broken)
        seen, wait = taken, scene.chance.randint(*_BETWEEN)


def _recovered(scene: Scene) -> Any:
    return published(scene.store, f"sweeps/{NAME}/stages/recover")


def _run_through(scene: Scene) -> Scene:
    assert scene.driver is not None
    if scene.driver.wait(1800):
        raise SoakError(f"without faults: {(scene.folder / 'driver.log').read_text()[-3000:]}")
    scene.driver = None
    return scene


@contextmanager
def scenery(folder: Path, seed: int) -> Iterator[Scene]:
    """Server, proxy, cluster and teacher; all ended with the block."""
    before = dict(os.environ)
    with ExitStack() as stack:
        server = stack.enter_context(serving(folder / "s3"))
        proxy = stack.enter_context(proxying(server.endpoint))
        os.environ.update(environment(server))
        os.environ |= {
            "AWS_ENDPOINT_URL": proxy.endpoint, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(folder / "cache"), "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
            # Ray makes its workers nice; beside other work they would hardly come to run.
            "RAY_worker_niceness": "0",
        }  # fmt: skip
        url = f"s3://{server.bucket}/soak"
        teacher = make_tiny_pipeline(folder / "teacher")
        document = {**CONFIG, "name": NAME, "teacher": str(teacher), "storage": url}
        (folder / "sweep.yaml").write_text(json.dumps(document))
        cluster = stack.enter_context(head_and_one(cpus=2))
        direct = open_store(url, StoreOptions(endpoint=server.endpoint))
        scene = Scene(direct, url, proxy, cluster, folder, random.Random(seed), Tally())
        try:
            yield scene
        finally:
            if scene.driver is not None:
                scene.driver.kill()
                scene.driver.wait()
            os.environ.clear()
            os.environ.update(before)


def table(document: dict[str, Any]) -> str:
    rows = [(f"fault: {name}", count) for name, count in sorted(document["faults"].items())]
    rows += [
        ("requests that the proxy broke", document["broken_requests"]),
        ("restarts of the workers", document["restarts"].get("workers", 0)),
        ("restarts of the sweep", document["restarts"].get("sweep", 0)),
        ("  of these after an error of its own", len(document["failures"])),
        ("runs completed", document["completed"]),
        ("  of these the first one, bit for bit", document["alike"]),
        ("steps taken again", document["lost_steps"]),
        (f"  at most, of {EVERY} between checkpoints", document["most_lost_steps"]),
        ("lost objects", document["lost_objects"]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {count:>6}" for name, count in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="after the first run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/soak"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    wrong = None
    with tempfile.TemporaryDirectory(prefix="espalier-soak-") as scratch:
        with scenery(Path(scratch), given.seed) as scene:
            try:
                soak(
                    scene,
                    lambda tally: time.monotonic() - (tally.began or 0) < 60 * given.minutes,
                    lambda said: print(f"{time.monotonic() - began:7.1f} s  {said}", flush=True),
                )
            except SoakError as error:
                wrong = str(error)
                print(f"FAILED: {wrong}", flush=True)
        document = {
            "minutes": (time.monotonic() - began) / 60, "seed": given.seed, "wrong": wrong,
            **scene.tally.document(),
        }  # fmt: skip
    (given.out / "soak.json").write_text(json.dumps(document, indent=1))
    print(table(document))
    sys.exit(wrong is not None)


if __name__ == "__main__":
    main()

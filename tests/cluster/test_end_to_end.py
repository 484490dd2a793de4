"""The whole sweep by its command: on S3 with a tiny teacher, and the miniature's killed in every
stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from search.trials import load_trials
from storage import layout
from storage.manifest import fetch, published
from storage.store import open_store
from trainers.students.plan import load_plan

ROOT = Path(__file__).parents[2]
MINIATURE = ROOT / "examples" / "miniature"
COMMAND = [sys.executable, "-m", "cluster.cli.main"]
STAGES = ("encode", "analyse", "library", "search", "recover", "publish", "report")

TINY: dict[str, Any] = {
    "name": "tiny",
    "budgets": ["60%"],
    "workers": 2,
    "data": {"pictures": 32, "held_out": 8, "shard": 8},
    "analyse": {"pictures": 4, "bands": 2, "tokens": 64, "replacements": 8},
    "library": {"steps": 3, "batch_size": 4, "max_span": 3, "widths": [1.0, 0.5], "group": 2},
    "search": {"trials": 6, "lag": 4, "probe": {"pictures": 4, "timesteps": 2}},
    "recover": {
        "schedules": 1,
        "space": {
            "phases": [
                {"loss": "span", "steps": 3, "lr": 0.001, "batch_size": 4},
                {"loss": "velocity", "train": "all", "steps": 3, "lr": 0.001, "batch_size": 4},
            ]
        },
    },
    "judge": {"task": "shapes", "per_family": 1, "steps": 2, "shown": 4},
}


def write_config(folder: Path, teacher: Path, storage: str, **changes: object) -> Path:
    path = folder / "sweep.yaml"
    document = {**TINY, "teacher": str(teacher), "storage": storage, **changes}
    path.write_text(json.dumps(document))
    return path


def espalier(*arguments: str | Path) -> list[dict[str, Any]]:
    """The events that the command printed as JSON; it must end well."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments), "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def ended(events: list[dict[str, Any]]) -> dict[str, bool]:
    """By stage, whether it had been done before."""
    return {e["stage"]: e["reused"] for e in events if e["event"] == "done"}


@pytest.mark.timeout(1800)
def test_a_sweep_on_s3(tmp_path: Path, tiny_pipeline: Path, s3_url: str) -> None:
    config = write_config(tmp_path, tiny_pipeline, s3_url)
    events = espalier("sweep", config)
    assert ended(events) == dict.fromkeys(STAGES, False)
    (student,) = events[-1]["students"]
    store = open_store(s3_url)

    prefix = student["url"].removeprefix(f"{s3_url}/")
    assert prefix == "best/60pct"
    best = published(store, prefix)
    assert best is not None
    assert best.meta["plan"] == student["plan"]
    folder = tmp_path / "student"
    fetch(store, prefix, folder)
    assert load_plan(folder / "plan.json").digest == student["plan"]
    assert (folder / "README.md").read_text().startswith("---")
    report = published(store, "sweeps/tiny/report")
    assert report is not None
    assert "report.html" in report.files

    again = espalier("sweep", config)
    assert ended(again) == dict.fromkeys(STAGES, True)
    assert again[-1] == events[-1]

    trained = set(store.keys("library"))
    other = write_config(
        tmp_path, tiny_pipeline, s3_url, name="other", budgets=["80%"],
        library={**TINY["library"], "starts": ["library", "average"]},
    )  # fmt: skip
    for stage in ("encode", "analyse"):
        assert ended(espalier(stage, other)) == {stage: True}
    library = espalier("library", other)
    assert ended(library) == {"library": False}
    record = published(store, "sweeps/other/stages/library")
    assert record is not None
    facts = record.meta["facts"]
    assert isinstance(facts, Mapping)
    added = {key.rsplit("/", 1)[0] for key in set(store.keys("library")) - trained}
    assert facts["measured"] > 0
    assert facts["trained"] + facts["measured"] == len(added)

    assert ended(espalier("search", other)) == {"search": False}
    trials = load_trials(store, layout.search("other"))
    assert trials is not None
    assert all(trial.state == "complete" for trial in trials)
    changed = [b for trial in trials for b in trial.plan.blocks if not b.untouched]
    assert {block.untrained for block in changed} == {True, False}


@pytest.mark.timeout(900)
def test_ctrl_c_leaves_a_sweep_that_resumes(tmp_path: Path, tiny_pipeline: Path) -> None:
    """Ctrl-C in a terminal reaches the whole group, Ray's processes among them."""
    config = write_config(tmp_path, tiny_pipeline, str(tmp_path / "runs"))
    with subprocess.Popen(
        [*COMMAND, "sweep", str(config), "--json"], cwd=ROOT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        assert running.stderr is not None
        events = (json.loads(line) for line in running.stdout if line.startswith("{"))
        next(
            e for e in events if e["event"] == "progress" and e["stage"] == "library" and e["done"]
        )
        began = children_of(running.pid)
        os.killpg(running.pid, signal.SIGINT)
        said = running.stderr.read()
    assert running.returncode == 130, said
    assert "Traceback" not in said
    assert f"the sweep resumes with: espalier sweep {config}" in said
    assert len(began) > 2
    _, left = psutil.wait_procs(began, timeout=30)
    assert left == []
    assert ended(espalier("sweep", config)) == {
        stage: stage in ("encode", "analyse") for stage in STAGES
    }


def children_of(pid: int) -> list[psutil.Process]:
    """Ray's among them, which are sessions of their own."""
    return psutil.Process(pid).children(recursive=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_sweep_killed_in_every_stage_ends_alike(tmp_path: Path) -> None:
    # Two schedules: one is measured when the recoveries are cut off, and the other is not.
    recover = {**TINY["recover"], "schedules": 2}
    # Most plans are the sampler's.
    changes = {"recover": recover, "search": {**TINY["search"], "trials": 12, "exact": 1}}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs = [espalier("sweep", write_config(tmp_path, MINIATURE, str(whole), **changes))]
    config = write_config(tmp_path, MINIATURE, str(killed), **changes)
    finished: dict[Path, int] = {}
    for stage in STAGES:
        kill_in(stage, config, killed)
        assert stage not in UNITS or units(killed, stage)
        finished |= all_units(killed)
    runs.append(espalier("sweep", config))
    now = all_units(killed)
    assert {path: now.get(path) for path in finished} == finished
    plans = [[student["plan"] for student in run[-1]["students"]] for run in runs]
    assert plans[0] == plans[1]
    assert fidelity_losses(killed) == pytest.approx(fidelity_losses(whole), rel=1e-3)
    assert proposed_by(killed) == proposed_by(whole)
    assert proposed_by(whole).count("tpe") >= 4


UNITS = {
    "encode": "encoded/*/shard-*/manifest.json",
    "library": "library/*/*/manifest.json",
    "search": "sweeps/tiny/search/scores/*.json",
    "recover": "sweeps/tiny/recovery/*/*/after-*/manifest.json",
    "publish": "sweeps/tiny/judged/*/manifest.json",
}
"""What a stage leaves of each unit of its work; the others are all or nothing."""


def units(root: Path, stage: str) -> dict[Path, int]:
    """When each finished unit of a stage was written."""
    return {path: path.stat().st_mtime_ns for path in root.glob(UNITS[stage])}


def all_units(root: Path) -> dict[Path, int]:
    """The units of every stage."""
    return {path: at for stage in UNITS for path, at in units(root, stage).items()}


def kill_in(stage: str, config: Path, root: Path) -> None:
    """Starts the sweep and ends it with SIGKILL as soon as a stage has done something that it must
    not do again."""
    with subprocess.Popen(
        [*COMMAND, "sweep", str(config), "--json"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        for line in running.stdout:
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("stage") == stage and has_begun(event, root):
                break
        running.send_signal(signal.SIGKILL)


def has_begun(event: Mapping[str, Any], root: Path) -> bool:
    """Whether an event of a stage comes after its first unit; report, which tells no progress, has
    begun when it starts."""
    stage = event["stage"]
    if event["event"] != "progress":
        return event["event"] == "done" or stage == "report"
    return event["done"] > 0 and (stage not in UNITS or bool(units(root, stage)))


def proposed_by(root: Path) -> list[str]:
    trials = load_trials(open_store(str(root)), layout.search("tiny"))
    assert trials is not None
    return [trial.origin for trial in trials]


def fidelity_losses(root: Path) -> dict[str, float | None]:
    """What the search measured, by plan."""
    trials = load_trials(open_store(str(root)), layout.search("tiny"))
    assert trials is not None
    return {trial.plan.digest: trial.fidelity_loss for trial in trials}

"""Trackers: what they are told of a sweep, read back; told once; and never a reason to stop."""

from __future__ import annotations

import json
import socket
import struct
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from cluster.cli.run import run_stages
from search.config import SweepConfig
from search.judging import Judged, write_judged
from search.recover import Measured, Recovery, steps_until
from search.stages import stage_named
from search.stages.publish import judged_prefix
from search.stages.record import StageRecord, write_record
from search.sweep import Sweep, open_sweep
from search.tracking.mlflow import KEY
from search.tracking.runs import runs_of
from search.tracking.track import TrackError, Trackers
from search.trials import Trial, save_trials
from storage import layout
from storage.manifest import publish, published
from trainers.students.plan import uniform_plan
from trainers.worker import LOSSES

STARTED = datetime(2026, 11, 21, tzinfo=UTC)
TRAINING = [0.5, 0.25, 0.125]


def opened(folder: Path, teacher: Path, track: dict[str, str], **changes: object) -> Sweep:
    return open_sweep(
        SweepConfig.model_validate(
            {
                "name": "tiny",
                "teacher": str(teacher),
                "storage": str(folder / "runs"),
                "budgets": ["60%"],
                "track": track,
                **changes,
            }
        )
    )


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def sweep(tmp_path: Path, tiny_pipeline: Path, uri: str) -> Sweep:
    """Search and recovery are done, with one failure each."""
    track = {"tensorboard": str(tmp_path / "board"), "mlflow": uri}
    sweep = opened(tmp_path, tiny_pipeline, track)
    trials = [("exact", 3, 0.5), ("tpe", 2, None), ("tpe", 4, 0.25)]
    search(sweep, trials)
    schedule = sweep.config.recover.space.schedule(sweep.config.recover.space.middle())
    recoveries = []
    states: list[Any] = ["complete", "stopped", "failed"]
    for number, state in enumerate(states):
        name = f"0-{number}-abc"
        measured = [Measured(part=0.25, fidelity_loss=0.25), Measured(part=1, fidelity_loss=0.125)]
        recovery = Recovery(
            budget="60pct", trial=name, student=layout.finalist("tiny", "60pct", name), finalist=0,
            plan=uniform_plan("qwen_image", 6, 3), schedule=schedule, loss_before=0.5,
            measured=tuple(measured[: 2 - number]), state=state,
            fidelity_loss=0.125 if state == "complete" else None,
            failed="its loss is not a number" if state == "failed" else None, seconds=6.0,
        )  # fmt: skip
        recoveries.append(recovery.model_dump(mode="json"))
    trained(sweep, "0-0-abc", 1, TRAINING)
    trained(sweep, "0-1-abc", 0.25, TRAINING[:1])
    done(sweep, "recover", {"recoveries": recoveries})
    return sweep


def search(sweep: Sweep, found: list[tuple[Any, int, float | None]]) -> None:
    trials = [
        Trial(
            number=number, budget="60pct", origin=origin, parameters=1000 * blocks, damage=0.5,
            plan=uniform_plan("qwen_image", 6, blocks), expected=None, fidelity_loss=loss,
            seconds=0.5,
            state="failed" if loss is None else "complete",
        )
        for number, (origin, blocks, loss) in enumerate(found)
    ]  # fmt: skip
    save_trials(sweep.store, layout.search(sweep.name), trials)
    done(sweep, "search", {})


def trained(sweep: Sweep, name: str, part: float, losses: list[float]) -> None:
    space = sweep.config.recover.space
    steps = steps_until(part, space.schedule(space.middle()))
    prefix = layout.measured("tiny", "60pct", name, steps)
    publish(sweep.store, prefix, {LOSSES: json.dumps(losses).encode()})


def published_student(sweep: Sweep) -> None:
    student = layout.finalist("tiny", "60pct", "0-0-abc")
    scores = {"counting": 0.5, "position": 1.0, "overall": 0.75}
    write_judged(sweep.store, judged_prefix(sweep, student), Judged(scores, [], [], []))
    said = {"finalist": student, "prefix": "best/60pct"}
    done(sweep, "publish", {"students": {"60pct": said}})


def done(sweep: Sweep, stage: str, facts: dict[str, Any]) -> None:
    record = StageRecord(
        stage=stage, digest=stage_named(stage).digest(sweep), started=STARTED, seconds=2.0,
        workers=2, summary=f"{stage} invented", facts=facts,
    )  # fmt: skip
    write_record(sweep.store, sweep.name, record)


def board(sweep: Sweep) -> dict[str, list[Event]]:
    """The events of every TensorBoard run, by its folder; each folder holds one file."""
    root = Path(sweep.config.track.tensorboard or "")
    files = [path for path in root.rglob("*") if path.is_file()]
    assert all("tfevents" in file.name for file in files)
    runs = {str(file.parent.relative_to(root)): events(file.read_bytes()) for file in files}
    assert len(runs) == len(files)
    return runs


def events(content: bytes) -> list[Event]:
    """Records of TensorFlow's format: length, its checksum, the message, its checksum."""
    found = []
    while content:
        (length,) = struct.unpack_from("<Q", content)
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def scalars(found: list[Event], tag: str) -> list[tuple[int, float]]:
    return [
        (event.step, value.simple_value)
        for event in found
        for value in event.summary.value
        if value.tag == tag
    ]


def hparams(found: list[Event]) -> list[str]:
    """What TensorBoard's table has columns for."""
    contents = [
        HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in found
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "hparams"
    ]
    return [name for content in contents for name in content.session_start_info.hparams]


def rows(uri: str, experiment: str = "tiny") -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else list(client.search_runs([found.experiment_id]))


def test_tensorboard_shows_trials_by_origin_and_recoveries_step_by_step(sweep: Sweep) -> None:
    published_student(sweep)
    assert Trackers(sweep).write() == []
    runs = board(sweep)
    assert set(runs) == {
        "tiny/search/60pct/exact", "tiny/search/60pct/tpe", "tiny/recovery/60pct/0-0-abc",
        "tiny/recovery/60pct/0-1-abc", "tiny/recovery/60pct/0-2-abc", "tiny/published/60pct",
        "tiny/stages/search", "tiny/stages/recover", "tiny/stages/publish",
    }  # fmt: skip
    tpe = runs["tiny/search/60pct/tpe"]
    assert scalars(tpe, "search/fidelity_loss") == [(2, 0.25)]
    assert scalars(tpe, "search/parameters") == [(1, 2000.0), (2, 4000.0)]
    recovery = runs["tiny/recovery/60pct/0-0-abc"]
    assert scalars(recovery, "recovery/loss") == list(enumerate(TRAINING, start=1))
    assert [value for _, value in scalars(recovery, "recovery/fidelity_loss")] == [0.5, 0.25, 0.125]
    stopped = runs["tiny/recovery/60pct/0-1-abc"]
    assert [value for _, value in scalars(stopped, "recovery/loss")] == TRAINING[:1]
    assert set(hparams(recovery)) >= {"1 span steps", "2 velocity lr", "budget"}
    assert recovery[-1].wall_time == STARTED.timestamp() + 6
    assert recovery[-1].step == len(TRAINING)
    student = runs["tiny/published/60pct"]
    assert scalars(student, "published/judge_score/overall") == [(0, 0.75)]
    assert scalars(runs["tiny/stages/recover"], "stages/seconds") == [(0, 2.0)]


def test_mlflow_holds_a_run_for_every_result(sweep: Sweep, uri: str) -> None:
    published_student(sweep)
    assert Trackers(sweep).write() == []
    found = {run.info.run_name: run for run in rows(uri)}
    assert set(found) == {
        "tiny/search/0", "tiny/search/1", "tiny/search/2", "tiny/recovery/60pct/0-0-abc",
        "tiny/recovery/60pct/0-1-abc", "tiny/recovery/60pct/0-2-abc", "tiny/published/60pct",
        "tiny/stages/search", "tiny/stages/recover", "tiny/stages/publish",
    }  # fmt: skip
    trial = found["tiny/search/2"]
    assert trial.data.metrics == {
        "fidelity loss": 0.25, "parameters": 4000, "summed damage": 0.5,
    }  # fmt: skip
    assert trial.data.params["origin"] == "tpe"
    assert trial.data.params["budget"] == "60pct"
    assert trial.data.params["blocks"] == "4"
    assert trial.info.status == "FINISHED"
    assert trial.info.end_time - trial.info.start_time == 500
    failed = found["tiny/search/1"]
    assert failed.info.status == "FAILED"
    assert "fidelity loss" not in failed.data.metrics
    assert found["tiny/published/60pct"].data.metrics["judge score/counting"] == 0.5
    recoveries = [found[f"tiny/recovery/60pct/0-{n}-abc"] for n in range(3)]
    assert [run.info.status for run in recoveries] == ["FINISHED", "KILLED", "FAILED"]
    assert [run.data.metrics["fidelity loss"] for run in recoveries] == [0.125, 0.25, 0.5]
    assert "not a number" in recoveries[2].data.tags["mlflow.note.content"]
    assert curve(uri, found["tiny/recovery/60pct/0-0-abc"].info.run_id) == TRAINING


def curve(uri: str, run: str) -> list[float]:
    from mlflow.tracking import MlflowClient

    return [metric.value for metric in MlflowClient(uri).get_metric_history(run, "loss")]


def test_a_sweep_that_is_run_again_adds_what_is_missing_and_nothing_twice(
    sweep: Sweep, uri: str
) -> None:
    assert Trackers(sweep).write() == []
    before = board(sweep)
    ids = {run.info.run_id for run in rows(uri)}
    assert Trackers(sweep).write() == []
    assert board(sweep) == before
    assert {run.info.run_id for run in rows(uri)} == ids
    published_student(sweep)
    assert Trackers(sweep).write() == []
    assert set(board(sweep)) - set(before) == {"tiny/published/60pct", "tiny/stages/publish"}
    later = {run.info.run_id for run in rows(uri)}
    assert ids < later
    assert len(later) == len(ids) + 2


def test_a_run_that_was_being_written_is_written_anew(sweep: Sweep, uri: str) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    half = runs_of(sweep)[0]
    place = client.create_experiment("tiny")
    client.create_run(place, tags={KEY: half.key}, run_name=half.name)
    mine = client.create_run(place, run_name="somebody's own")
    assert Trackers(sweep).write() == []
    found = rows(uri)
    (again,) = [run for run in found if run.info.run_name == half.name]
    assert again.info.status == "FINISHED"
    assert mine.info.run_id in {run.info.run_id for run in found}


def test_another_search_of_the_sweep_replaces_its_series_and_joins_its_runs(
    sweep: Sweep, tmp_path: Path, tiny_pipeline: Path, uri: str
) -> None:
    assert Trackers(sweep).write() == []
    changed = opened(
        tmp_path, tiny_pipeline, sweep.config.track.model_dump(), search={"sampler": "random"}
    )
    search(changed, [("random", 3, 0.75)])
    assert Trackers(changed).write() == []
    assert set(board(changed)) == {"tiny/search/60pct/random", "tiny/stages/search"}
    assert [run.info.run_name for run in rows(uri)].count("tiny/search/0") == 2


def test_long_loss_curves_reach_mlflow_whole(sweep: Sweep, uri: str) -> None:
    long = [1 / (1 + step) for step in range(2300)]
    trained(sweep, "0-2-abc", 1, long)
    assert Trackers(sweep).write() == []
    (run,) = [r for r in rows(uri) if r.info.run_name == "tiny/recovery/60pct/0-2-abc"]
    assert curve(uri, run.info.run_id) == long


def test_a_tracker_that_is_away_is_a_warning_and_gets_what_it_missed_later(
    sweep: Sweep, tmp_path: Path, tiny_pipeline: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as nobody:  # bound, and not listening
        nobody.bind(("127.0.0.1", 0))
        away = {"mlflow": f"http://127.0.0.1:{nobody.getsockname()[1]}"}
        cut_off = opened(tmp_path, tiny_pipeline, away)
        run_stages(cut_off, [stage_named("report")], as_json=False)
    said = capsys.readouterr().out
    assert "espalier: track.mlflow: could not be written to (" in said
    assert "the sweep goes on" in said
    assert published(sweep.store, layout.report("tiny")) is not None
    assert rows(uri) == []
    # The report is there already: nothing runs, and what is missing is told.
    run_stages(opened(tmp_path, tiny_pipeline, {"mlflow": uri}), [stage_named("report")], False)
    assert "tiny/stages/report" in {run.info.run_name for run in rows(uri)}
    assert "tiny/search/0" in {run.info.run_name for run in rows(uri)}


def test_a_folder_that_cannot_be_written_stops_nothing(
    sweep: Sweep, tmp_path: Path, tiny_pipeline: Path
) -> None:
    (tmp_path / "file").write_text("")
    in_the_way = opened(tmp_path, tiny_pipeline, {"tensorboard": str(tmp_path / "file")})
    (warning,) = Trackers(in_the_way).write()
    assert warning.startswith("track.tensorboard: could not be written to (")


def test_nothing_is_tracked_unless_asked(sweep: Sweep, tmp_path: Path, tiny_pipeline: Path) -> None:
    plain = opened(tmp_path, tiny_pipeline, {})
    assert Trackers(plain).write() == []
    assert not (tmp_path / "board").exists()
    assert not (tmp_path / "mlflow.db").exists()


def test_trackers_change_no_digest(sweep: Sweep, tmp_path: Path, tiny_pipeline: Path) -> None:
    plain = opened(tmp_path, tiny_pipeline, {})
    for name in ("encode", "search", "recover", "publish", "report"):
        assert stage_named(name).digest(plain) == stage_named(name).digest(sweep)


def test_mlflow_must_be_installed_when_it_is_asked_for(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(TrackError, match=r"pip install -e '\.\[mlflow\]'"):
        Trackers(sweep)


@pytest.mark.parametrize(
    ("track", "why"),
    [
        ({"mlflow": "https://me:secret@host"}, "MLFLOW_TRACKING_TOKEN"),
        ({"mlflow": "https://token@host"}, "MLFLOW_TRACKING_TOKEN"),
        ({"mlflow": "postgresql://host/db?password=secret"}, "MLFLOW_TRACKING_TOKEN"),
        ({"mlflow": "./mlruns"}, "sqlite:///file.db"),
        ({"tensorboard": "s3://bucket/board"}, "folder of this machine"),
    ],
)
def test_what_cannot_be_tracked_to_is_refused(track: dict[str, str], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        SweepConfig.model_validate(
            {"name": "tiny", "teacher": "x", "budgets": ["60%"], "track": track}
        )

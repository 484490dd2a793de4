"""MLflow runs, one a result, in an experiment of the sweep's name.

A run carries its key as a tag. One that is there and has ended is left alone; one that was being
written when the sweep was cut off is removed and written anew.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from search.tracking.runs import Run

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

KEY = "espalier.key"
ENVIRONMENT = {
    # A server that is away holds up the sweep for seconds, not for MLflow's minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # A sweep tells nobody but the server that it was given.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # The lines of a link to every run would bury the sweep's own.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Read by MLflow when it is imported; what is set already stays."""
STATUS = {"complete": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

SIDE_BY_SIDE = 8
"""Runs that are written to a server at a time."""

_PAGE = 1000
"""Most runs that a server returns at once."""
_BATCH = 900
"""Metrics in one request; a server takes 1000 things, of which up to 100 may be parameters."""


def installed() -> bool:
    from importlib.util import find_spec

    return find_spec("mlflow") is not None


def write(runs: Sequence[Run], uri: str, experiment: str) -> None:
    """Makes the runs at `uri` that are missing there."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    place = client.create_experiment(experiment) if found is None else found.experiment_id
    there = _ended(client, place)
    missing = [run for run in runs if run.key not in there]
    # A server takes its time over each of a run's requests; a file takes one writer.
    with ThreadPoolExecutor(SIDE_BY_SIDE if uri.startswith("http") else 1) as pool:
        for _ in pool.map(partial(_write_run, client, place), missing):
            pass


def _ended(client: MlflowClient, experiment: str) -> set[str]:
    """Keys of the runs that are whole; those that are not are removed."""
    keys: set[str] = set()
    token: str | None = None
    while True:
        page = client.search_runs([experiment], max_results=_PAGE, page_token=token)
        for run in page:
            key = run.data.tags.get(KEY)
            if key is not None and run.info.status == "RUNNING":
                client.delete_run(run.info.run_id)
            elif key is not None:
                keys.add(key)
        token = page.token
        if not token:
            return keys


def _write_run(client: MlflowClient, experiment: str, run: Run) -> None:
    from mlflow.entities import Metric, Param

    started = round(run.started.timestamp() * 1000)
    ended = started + round(run.seconds * 1000)
    tags = {KEY: run.key, "mlflow.note.content": run.said, "mlflow.source.name": "espalier"}
    made: Any = client.create_run(experiment, start_time=started, tags=tags, run_name=run.name)
    metrics = [Metric(name, value, ended, run.step) for name, value in run.results.items()]
    for name, curve in run.curves.items():
        metrics += [Metric(name, value, ended, step) for step, value in curve]
    params = [Param(name, str(value)) for name, value in run.choices.items()]
    for first in range(0, len(metrics), _BATCH):
        client.log_batch(made.info.run_id, metrics[first : first + _BATCH], params)
        params = []
    client.set_terminated(made.info.run_id, STATUS[run.state], end_time=ended)

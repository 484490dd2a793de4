"""Which trackers a sweep writes to."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from storage.section import Section
from storage.urls import without_password


def _folder(value: str) -> str:
    if "://" in value:
        raise ValueError(
            f"{value}: must be a folder of this machine; event files are written there"
        )
    return value


def _tracking_uri(value: str) -> str:
    without_password(
        value,
        "leave it to MLflow's own variables, MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN",
    )
    if not re.match(
        r"databricks$|databricks(-uc)?://|https?://|(sqlite|postgresql|mysql|mssql)", value
    ):
        raise ValueError(
            f"{value}: not a tracking URI; write http://host:port, or sqlite:///file.db without a "
            "server (MLflow has given up folders)"
        )
    return value


class TrackConfig(Section):
    """Where results are shown beside the report. They are written when a stage has ended; a tracker
    that cannot be reached then is warned of, and gets what it missed with the next stage or when
    the sweep is run again."""

    tensorboard: Annotated[str, AfterValidator(_folder)] | None = None
    """Folder for `tensorboard --logdir`, with a folder of the sweep's name in it: a run for every
    budget and origin of the search, with the trial's number as its step, and one for every
    recovery, stage and published student."""

    mlflow: Annotated[str, AfterValidator(_tracking_uri)] | None = None
    """MLflow tracking URI, such as `http://host:5000` or `sqlite:///mlflow.db`: an experiment of
    the sweep's name with a run for every trial, recovery, stage and published student. Needs
    `pip install -e '.[mlflow]'` in a clone; credentials come from MLflow's own variables."""

"""Tells a sweep's trackers what it has found so far, and never stops the sweep for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from search.sweep import Sweep
from search.tracking import mlflow, tensorboard
from search.tracking.runs import Run, runs_of
from storage.errors import EspalierError


class TrackError(EspalierError):
    """A tracker that cannot be written to from here."""


class Trackers:
    """The trackers of one sweep."""

    def __init__(self, sweep: Sweep) -> None:
        """TrackError when one is asked for that is not installed."""
        self._sweep, config = sweep, sweep.config.track
        self._write: dict[str, Callable[[Sequence[Run]], None]] = {}
        if config.tensorboard is not None:
            self._write["tensorboard"] = partial(
                tensorboard.write, folder=Path(config.tensorboard), sweep=sweep.name
            )
        if config.mlflow is not None:
            if not mlflow.installed():
                raise TrackError(
                    "track.mlflow: MLflow is not installed here; run pip install -e '.[mlflow]' in "
                    "your clone, or leave the key out"
                )
            self._write["mlflow"] = partial(mlflow.write, uri=config.mlflow, experiment=sweep.name)

    def write(self) -> list[str]:
        """Writes what is not there yet of the stages that are done; a sentence for each tracker
        that could not be written to."""
        said = []
        runs = runs_of(self._sweep) if self._write else []
        for name, write in self._write.items():
            try:
                write(runs)
            # Whatever a tracker raises: the stage's work is done, stored, and worth more.
            except Exception as error:
                said.append(
                    f"track.{name}: could not be written to ({_first_line(error)}); the sweep goes "
                    "on, and what is missing follows after the next stage or with the same command"
                )
        return said


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

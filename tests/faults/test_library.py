"""A library on a cluster whose machines go."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.store import open_store
from tests.faults.conftest import Row
from tests.nodes import ROOT, joined, machines
from tests.trainers.library.setting import (
    ENCODING,
    LONG,
    MANY,
    PROBE,
    SWEEP,
    checkpoints,
    put_latents,
    trained_digests,
)
from trainers.library.library import read_meta
from trainers.library.workers import LibraryReport, train_library
from trainers.progress import Progress, silent
from trainers.teacher import open_teacher

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

RARELY = LONG.model_copy(update={"checkpoint_every": 1000})
"""The only checkpoint is the one that notice brings."""


def test_a_machine_is_told_that_it_goes(
    tiny_pipeline: Path, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Row
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    teacher = open_teacher(tiny_pipeline)
    store, beside = open_store(f"{s3_url}/one"), open_store(f"{s3_url}/two")
    put_latents(store)
    put_latents(beside)

    def train(where: object, progress: Progress) -> LibraryReport:
        return train_library(
            teacher, MANY, where, ENCODING, RARELY, SWEEP, probe=PROBE, workers=1,  # type: ignore[arg-type]
            progress=progress,
        )  # fmt: skip

    with machines(head_cpus=0) as cluster:
        with joined(cluster, 1, grace=60, log=tmp_path / "first.log") as first:

            class Telling:
                told = False

                def update(self, done: int, total: int, **facts: float | str) -> None:
                    if done > 0 and not self.told:
                        self.told = True
                        cluster.add_node(num_cpus=1)
                        first.terminate()

            report = train(store, Telling())
            first.wait(60)
        undisturbed = train(beside, silent())
    assert undisturbed.interruptions == ()
    (interruption,) = report.interruptions
    assert interruption.why == "left because its machine goes"
    assert interruption.on_from > 0
    for block, prefix in report.prefixes.items():
        meta = read_meta(store, prefix)
        assert meta is not None
        expected = (interruption.on_from,) if block in interruption.blocks else ()
        assert meta.continued == expected
    assert trained_digests(store, teacher) == trained_digests(beside, teacher)
    assert checkpoints(store) == []
    row(
        "a library's machine told to go",
        f"saved at step {interruption.on_from}, went on from it elsewhere: 0 steps lost",
    )

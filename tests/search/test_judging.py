from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from search.judging import JudgeConfig, captions_for, judge_model, read_judged, write_judged
from storage.store import open_store

CAPTIONS = ["two crosses", "a circle at the top left", "a red circle", "three squares"]


class Blank:
    """A pipeline that draws white pictures."""

    vae = None

    def set_progress_bar_config(self, disable: bool) -> None:
        pass

    def __call__(self, prompt: list[str], height: int, width: int, **rest: Any) -> Any:
        class Drawn:
            images = [  # noqa: RUF012  # read once
                Image.fromarray(np.full((height, width, 3), 245, np.uint8)) for _ in prompt
            ]

        return Drawn


def test_captions_come_from_the_task_or_the_data() -> None:
    assert len(captions_for(JudgeConfig(task="shapes", per_family=2), [])) == 12
    assert captions_for(JudgeConfig(shown=2), CAPTIONS) == CAPTIONS[:2]


def test_what_is_judged_can_be_read_back(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("trainers.data.single_frame.for_single_frames", lambda vae: None)
    config = JudgeConfig(task="shapes", shown=2)
    judged = judge_model(Blank(), config, CAPTIONS, 64)
    assert judged.scores["overall"] == 0
    assert judged.captions == [CAPTIONS[0], CAPTIONS[2]]
    store = open_store(str(tmp_path))
    write_judged(store, "judged/one", judged)
    read = read_judged(store, "judged/one")
    assert read is not None
    assert (read.scores, read.captions, read.passed) == (
        judged.scores,
        judged.captions,
        judged.passed,
    )
    assert [picture.size for picture in read.pictures] == [(64, 64), (64, 64)]
    assert read_judged(store, "judged/two") is None

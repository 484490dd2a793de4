"""`espalier generate`, `judge` and `plug` on a real, tiny model, from words to files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from cluster.cli.main import app
from tests.trainers.students.tiny import count
from trainers.evaluate import generate
from trainers.export import export_student, load_pipeline
from trainers.students.plan import load_plan, uniform_plan
from trainers.students.surgery import assemble
from trainers.tasks import TASKS
from trainers.teacher import Teacher

SMALL = ("--size", "64", "--steps", "2", "--seed", "3")


def espalier(*arguments: str | Path) -> Result:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done


def test_a_picture_is_drawn_as_asked(teacher: Teacher, tmp_path: Path) -> None:
    file = tmp_path / "new" / "circle.png"
    done = espalier("generate", teacher.found, "--prompt", "a red circle", "--out", file, *SMALL)
    assert f"{file}  64 × 64 pixels, 2 steps, seed 3" in done.stdout
    with Image.open(file) as picture:
        drawn = np.asarray(picture)
    assert drawn.shape == (64, 64, 3)
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 1
    (wanted,) = generate(teacher.pipeline(), ["a red circle"], seed=3, steps=2, size=64)
    assert np.array_equal(drawn, np.asarray(wanted))


def test_a_judge_scores_every_family(teacher: Teacher) -> None:
    judged = ("judge", teacher.found, "--task", "shapes", "--per-family", "1", *SMALL)
    said = json.loads(espalier(*judged, "--json").stdout)
    families = TASKS["shapes"].families
    assert said.keys() == {"model", "captions", "scores"}
    assert said["model"] == str(teacher.found)
    assert said["captions"] == len(families)
    assert list(said["scores"]) == [*families, "overall"]
    assert all(0 <= score <= 1 for score in said["scores"].values())


def test_blocks_are_plugged_back_from_the_command_line(teacher: Teacher, tmp_path: Path) -> None:
    plan = uniform_plan("qwen_image", 6, 3, start="average")
    student = assemble(teacher.transformer(), plan)
    small, larger = tmp_path / "small", tmp_path / "larger"
    export_student(teacher, student, plan, small)
    said = {"resolution": 64, "teacher": teacher.digest}
    (small / "espalier.json").write_text(json.dumps(said))
    restored = ("--restore", "2-3", "--teacher", teacher.found)
    done = espalier("plug", small, *restored, "--out", larger)
    spans = [block.span for block in load_plan(larger / "plan.json").blocks]
    assert spans == [(0, 1), (2, 2), (3, 3), (4, 5)]
    loaded = load_pipeline(larger).transformer
    own, theirs = (model.transformer_blocks for model in (loaded, teacher.transformer()))
    for block, source in ((own[1], theirs[2]), (own[2], theirs[3])):
        weights = source.state_dict()
        assert all(torch.equal(t, weights[name]) for name, t in block.state_dict().items())
    counts = f"4 blocks, {count(loaded):,} parameters (was {count(student):,})"
    assert f"{larger}  {counts}" in done.stdout
    assert json.loads((larger / "espalier.json").read_text()) == said

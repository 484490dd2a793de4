"""The recipes are configurations that a sweep takes, of the sizes that the papers publish."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.configfile import load_config
from search.config import SweepConfig
from tests.trainers.students.tiny import count
from trainers.students.counts import plan_parameters
from trainers.students.families import family_named
from trainers.students.plan import uniform_plan

RECIPES = sorted(Path("examples/recipes").glob("*.yaml"))
PUBLISHED = {
    "ppcl-qwen-image-10b": 10_575_332_416,
    "ppcl-qwen-image-11b": 10_952_905_792,
    "ppcl-qwen-image-12b": 11_934_618_688,
    "ppcl-qwen-image-14b": 13_633_775_168,  # ours, see the recipe
    "amber-qwen-image-6b": 6_837_149_248,  # by arithmetic; the paper says 6B
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_configuration(recipe):
    config = load_config(recipe, [], SweepConfig)
    assert config.name == recipe.stem
    if config.plan is None or recipe.stem not in PUBLISHED:
        return
    family = family_named(config.plan.family)
    sizes = {**family.published, "num_layers": config.plan.teacher_blocks}
    parameters = plan_parameters(config.plan, sizes)
    assert parameters == PUBLISHED[recipe.stem]
    assert parameters == count(family.build(sizes, config.plan, "meta"))
    assert parameters <= config.budgets[0].limit(20_430_401_088)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_names_a_plan_is_counted(recipe):
    done = CliRunner().invoke(app, ["plan", str(recipe), "--json"])
    config = load_config(recipe, [], SweepConfig)
    if config.plan is None:
        assert done.exit_code == 1
        assert f"{recipe}: this recipe names no plan" in done.stderr
    elif recipe.stem in PUBLISHED:
        assert json.loads(done.output)["parameters"] == PUBLISHED[recipe.stem]


def test_a_recipe_is_counted_by_its_own_teacher(tmp_path, tiny_pipeline):
    plan = uniform_plan("qwen_image", 6, 3)
    recipe = tmp_path / "recipe.yaml"
    made = {"teacher": str(tiny_pipeline), "plan": plan.model_dump(mode="json")}
    recipe.write_text(json.dumps(made))
    said = json.loads(CliRunner().invoke(app, ["plan", str(recipe), "--json"]).output)
    sizes = json.loads((tiny_pipeline / "transformer" / "config.json").read_text())
    assert said["parameters"] == plan_parameters(plan, sizes)
    assert said["assumed"] is None
    recipe.write_text(json.dumps({**made, "teacher": "runs/best/absent"}))
    said = json.loads(CliRunner().invoke(app, ["plan", str(recipe), "--json"]).output)
    assert said["assumed"].startswith("its teacher runs/best/absent is no folder here")
    assert said["teacher"]["blocks"] == 6
    recipe.write_text(json.dumps({**made, "plan": uniform_plan("qwen_image", 7, 3).model_dump()}))
    done = CliRunner().invoke(app, ["plan", str(recipe)])
    assert f"teacher {tiny_pipeline}: has 6 blocks" in done.stderr


def test_every_published_size_has_a_recipe():
    assert set(PUBLISHED) <= {recipe.stem for recipe in RECIPES}

"""The recipes are configurations that a sweep takes, of the sizes that the papers publish."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.configfile import load_config
from search.config import SweepConfig
from tests.trainers.students.tiny import count
from trainers.students.counts import plan_parameters
from trainers.students.families import family_named

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


def test_every_published_size_has_a_recipe():
    assert set(PUBLISHED) <= {recipe.stem for recipe in RECIPES}

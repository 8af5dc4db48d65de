"""A finished run on the tiny base, made once, for the tests that publish from it."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import tiny_tree

from pipeline import strict_yaml
from pipeline.artifact import write_text
from pipeline.recipe import Recipe, build
from pipeline.worker import run_stage

BASE_ID = "tester/tiny-base"


def finished_run(base: Path, runs: Path, *stages: str) -> Recipe:
    """The recipe of a run whose stages are trained and sealed below `runs`, hot enough that the adapter shows."""
    runs.mkdir(exist_ok=True)
    tree = json.loads(json.dumps(tiny_tree(base, runs)))  # no two sections share an object: recipes have no anchors
    tree["model"]["public_id"] = BASE_ID
    tree["model"]["chat_template"] = "recipes/templates/chatml.jinja"
    tree["train"]["learning_rate"] = 3e-3
    recipe = build(tree)
    for stage in recipe.order():
        if stage in stages:
            run_stage(recipe, stage, runs)
    write_text(runs / recipe.name / "recipe.yaml", strict_yaml.dump(recipe.tree))
    return recipe

"""The schema an editor checks a recipe by is that of the sections: what is sound passes, and a slip is underlined."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, onebase
from jsonschema import Draft7Validator

from pipeline.recipe import yaml
from pipeline.recipe.schema import make_schema
from pipeline.recipe.sections import RecipeSpec
from pipeline.stages import STAGES

RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if "accelerate" not in path.parts)
SCHEMA = make_schema()


def places(tree: Any) -> list[str]:
    """Where the schema objects."""
    return [".".join(map(str, error.absolute_path)) for error in Draft7Validator(SCHEMA).iter_errors(tree)]


def test_it_is_a_schema() -> None:
    Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_passes(path: Path) -> None:
    assert places(yaml.load(path)[0]) == []


@pytest.mark.parametrize(
    ("fault", "at"),
    [
        (lambda tree: tree["model"].update(bass=tree["model"].pop("base")), "model"),
        (lambda tree: tree["stages"]["sft"]["train"].update(learning_rate="fast"), "stages.sft.train.learning_rate"),
        (lambda tree: tree["stages"]["ppo"]["train"].update(kl_coeff=0.1), "stages.ppo.train"),
        (lambda tree: tree["stages"]["dpo"].update(reward="reward"), "stages.dpo"),
        (lambda tree: tree["stages"].update({"gentle": {"data": {"path": "a.jsonl"}}}), "stages.gentle"),
        (lambda tree: tree["stages"].update({"gentle": {"kind": "pdo", "data": {"path": "a"}}}), "stages.gentle.kind"),
        (lambda tree: tree["stages"]["sft"]["train"].update(output_dir="out"), "stages.sft.train.output_dir"),
        (lambda tree: tree["stages"]["sft"]["data"].pop("path"), "stages.sft.data"),
        (lambda tree: tree.update(expect={"sft.loss": "about 2"}), "expect.sft.loss"),
    ],
)
def test_planted_faults_are_found_where_they_are(fault: Any, at: str) -> None:
    tree = copy.deepcopy(yaml.load(ROOT / "recipes" / "quickstart.yaml")[0])
    fault(tree)
    assert at in places(tree)


def test_a_stage_is_told_by_its_kind() -> None:
    sound = yaml.load(ROOT / "recipes" / "quickstart.yaml")[0]
    fork = {"kind": "dpo", "from": "sft", "data": {"path": "a.jsonl"}, "train": {"beta": 0.05}}
    assert places({**sound, "stages": {**sound["stages"], "gentle": fork}}) == []
    named_as_another = {"sft": {**fork, "from": None, "reward": "no word of dpo"}}
    assert places({**sound, "stages": named_as_another}) == ["stages.sft"]


def test_auto_is_for_the_words_that_the_planner_chooses() -> None:
    sound = yaml.load(ROOT / "recipes" / "quickstart.yaml")[0]
    for word, objects in (("max_length", False), ("learning_rate", True)):
        tree = copy.deepcopy(sound)
        tree["stages"]["ppo"]["train"][word] = tree["stages"]["dpo"]["train"][word] = "auto"
        assert bool(places(tree)) is objects


def test_every_field_is_explained_or_explains_itself() -> None:
    """What stands below a field in the source reaches the editor."""
    definitions = SCHEMA["definitions"]
    assert SCHEMA["properties"]["name"]["description"] == "Folder of the run below runs/."
    for stage in STAGES.values():
        section = definitions[stage.section.__name__]
        assert set(section["properties"]) == {field.alias or name for name, field in stage.section.model_fields.items()}
        assert section["properties"]["from"]["description"].startswith("The stage whose adapter")
        assert definitions[f"train-{stage.name}"]["properties"]["learning_rate"]
    assert "LoRA" in str(definitions["ModelSpec"]["properties"]["lora"])
    assert definitions["train-ppo"]["properties"]["kl_coef"]["default"] == 0.05
    assert definitions["train-dpo"]["properties"]["beta"]["default"] == 0.1
    assert set(SCHEMA["properties"]) == set(RecipeSpec.model_fields)


def test_the_command_prints_or_writes_it(tmp_path: Path) -> None:
    assert json.loads(onebase(ROOT, tmp_path, "schema")) == SCHEMA
    assert onebase(ROOT, tmp_path, "schema", "-o", "recipe.schema.json") == "recipe.schema.json\n"
    assert json.loads((tmp_path / "recipe.schema.json").read_text(encoding="utf-8")) == SCHEMA

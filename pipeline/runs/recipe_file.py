"""A run's recipe.yaml: the recipe as resolved, and in comments the numbers that its autos stood for."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.disk.artifact import Artifact
from pipeline.disk.atomic import digest, read_json, write_text
from pipeline.recipe import yaml
from pipeline.recipe.recipe import Recipe


def write_recipe(recipe: Recipe, file: Path, runs: Path) -> None:
    parts = recipe.parts()
    notes = [describe_choices(recipe.artifact(name, runs), digest(parts[name])) for name in recipe.order()]
    write_text(file, yaml.dump(recipe.pinned_tree()) + "".join(notes))


def describe_choices(out: Artifact, fingerprint: str) -> str:
    """What auto stood for in a stage, as comments of the resolved recipe."""
    noted = read_json(out.chosen) or {}
    if noted.get("fingerprint") != fingerprint:
        return ""
    lines = (f"# stages.{out.name}.train.{key}: {json.dumps(value)}\n" for key, value in noted["chosen"].items())
    return f"# auto, on {noted['for']}:\n" + "".join(lines)

"""A run's recipe.yaml: the recipe as resolved, and in comments the numbers that its autos stood for."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.disk.artifact import Artifact
from pipeline.disk.atomic import digest, read_json, write_text
from pipeline.errors import UserError
from pipeline.recipe import yaml
from pipeline.recipe.recipe import Recipe

HEADER = "# Written by a run of OneBase, and written anew by its next run.\n"
"""By which a run knows its own file from one that a person put there."""


def refuse_foreign(file: Path) -> None:
    """Raises UserError if a run would write over a file that no run wrote."""
    if file.exists() and not file.read_bytes().startswith(HEADER.encode()):
        raise UserError(
            f"{file} is there and was not written by a run. A run keeps its own recipe.yaml in its folder and would "
            "write over this one. Choose another --runs or another `name:`"
        )


def write_recipe(recipe: Recipe, file: Path, runs: Path) -> None:
    parts = recipe.parts()
    notes = [describe_choices(recipe.artifact(name, runs), digest(parts[name])) for name in recipe.order()]
    write_text(file, HEADER + yaml.dump(recipe.pinned_tree()) + "".join(notes))


def describe_choices(out: Artifact, fingerprint: str) -> str:
    """What auto stood for in a stage, as comments of the resolved recipe."""
    noted = read_json(out.chosen) or {}
    if noted.get("fingerprint") != fingerprint:
        return ""
    lines = (f"# stages.{out.name}.train.{key}: {json.dumps(value)}\n" for key, value in noted["chosen"].items())
    return f"# auto, on {noted['for']}:\n" + "".join(lines)

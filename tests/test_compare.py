"""Two runs side by side: what differs in their recipes, and which change is more than chance."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
import pytest
from conftest import tiny_tree
from planted import CHAIN, evaluation_of_a_run, folder_of_a_run, planted  # noqa: F401

from pipeline.disk.atomic import write_json
from pipeline.errors import UserError
from pipeline.evaluate import results
from pipeline.evaluate.stored import read_results
from pipeline.recipe import yaml
from pipeline.recipe.recipe import Recipe


def test_compare_shows_what_differs_item_by_item(tmp_path: Path, tiny_base: Path) -> None:
    """Two runs whose sft answers differ in a known number of questions; a changed word of the recipe; nothing else."""
    from rich.console import Console

    from pipeline.terminal import compare

    tree = tiny_tree(tiny_base, tmp_path)
    first, second = planted(numpy.random.default_rng(0)), planted(numpy.random.default_rng(0))
    (asked,), (again,) = ([r for m, r in taken if m.file == "questions-sft.json"] for taken in (first, second))
    right = asked["value"]["right"]
    wrong = [i for i, ok in enumerate(right) if not ok][:10]
    again["value"]["right"] = [ok or i in wrong for i, ok in enumerate(right)]
    other = {**tree, "stages": {**tree["stages"], "dpo": {**tree["stages"]["dpo"], "train": {"beta": 0.3}}}}
    for name, taken, written in (("a", first, tree), ("b", second, other)):
        for measure, record in taken:
            write_json(tmp_path / name / "evaluation" / measure.file, record)
        write_json(tmp_path / name / "evaluation" / "results.json", results.make(taken, CHAIN).sealed())
        (tmp_path / name / "recipe.yaml").write_text(yaml.dump(written))
    console = Console(width=300, record=True)
    compare.show(compare.compare(tmp_path / "a", tmp_path / "b"), console)
    told = console.export_text()
    assert (
        re.search(r"stages.dpo.train.beta\W+0.1\W+0.3", told)
        and "data (rows used, and the files' sha256): equal" in told
    )
    lines = told.splitlines()
    (changed,) = [index for index, line in enumerate(lines) if "answered right" in line]
    assert lines[changed - 1].startswith("sft") and "+25 points" in lines[changed]  # 10 of 40
    assert re.search(r" \+\d+ to \+\d+$", lines[changed + 1].rstrip())
    with pytest.raises(UserError, match="is not the folder of a run"):
        compare.compare(tmp_path / "a", tmp_path)


def test_compare_knows_when_an_evaluation_is_older_than_its_run(run: tuple[Recipe, Path]) -> None:
    from pipeline.terminal.compare import older

    recipe, runs = run
    folder = runs / recipe.name
    (folder / "recipe.yaml").write_text(yaml.dump(recipe.tree))
    found = read_results(folder / "evaluation")
    assert found is not None
    assert older(folder, found) == ""
    found.made_of["questions-sft.json"] = "of before"
    assert older(folder, found) == "questions-sft.json"

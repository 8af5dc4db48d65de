"""No command writes over a file of the person who types it."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import tiny_tree, write_recipe
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import UserError
from pipeline.recipe.recipe import read
from pipeline.runs.recipe_file import write_recipe as write_resolved
from pipeline.runs.runner import run


def test_a_run_does_not_write_over_a_recipe_in_its_folder(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    own = write_recipe(tiny_tree(tiny_base, tmp_path), folder / "recipe.yaml")
    before = own.read_bytes()
    with pytest.raises(UserError, match=r"tiny/recipe\.yaml is there and was not written by a run"):
        run(read(own), runs=tmp_path)
    assert own.read_bytes() == before and [path.name for path in folder.iterdir()] == ["recipe.yaml"]
    # What a run has written is its own: given as the recipe, the run goes on as far as it can.
    recipe = read(own)
    write_resolved(recipe, own, tmp_path)
    Path(str(recipe.stages["pretrain"].data.path)).write_text("{}\n", encoding="utf-8")
    with pytest.raises(UserError, match="has no field 'text'"):
        run(read(own), runs=tmp_path)


def test_a_schema_is_written_over_its_own_kind_only(tmp_path: Path) -> None:
    own = tmp_path / "schema.json"
    own.write_text('{"mine": 1}', encoding="utf-8")
    refused = CliRunner().invoke(app, ["schema", "-o", str(own)])
    assert "is there already and is no schema" in str(refused.exception) and own.read_text() == '{"mine": 1}'
    own.unlink()
    assert [CliRunner().invoke(app, ["schema", "-o", str(own)]).exit_code for _ in range(2)] == [0, 0]


def test_an_examination_does_not_write_over_rows_in_the_folder_of_a_run(tiny_base: Path, tmp_path: Path) -> None:
    tree = tiny_tree(tiny_base, tmp_path)
    folder = tmp_path / "tiny"
    folder.mkdir()
    rows = folder / "data.json"
    rows.write_bytes(Path(tree["stages"]["sft"]["data"]["path"]).read_bytes())
    before = rows.read_bytes()
    words = ["data", str(write_recipe(tree, tmp_path / "r.yaml")), "sft", "--runs", str(tmp_path)]
    refused = CliRunner().invoke(app, words)
    assert "is not a file of `onebase data`" in str(refused.exception) and rows.read_bytes() == before
    rows.unlink()
    assert all(CliRunner().invoke(app, words).exit_code == 0 for _ in range(2))

"""A stage owns its facts: a new one is one file and one line, and the commands know all they need of it from there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, onebase, tiny_tree, write_recipe

TOY = ROOT / "tests" / "toy_stage.py"


@pytest.fixture
def with_toy(tmp_path: Path) -> Path:
    """A copy of the package that has the toy stage: one file more, and one line changed."""
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(TOY, tmp_path / "pipeline" / "stages" / "toy.py")
    listed = tmp_path / "pipeline" / "stages" / "__init__.py"
    text = (
        listed.read_text()
        .replace("from pipeline.stages import ", "from pipeline.stages import toy, ")
        .replace("(pretrain.STAGE,", "(toy.STAGE, pretrain.STAGE,")
    )
    listed.write_text(text)
    return tmp_path


def test_a_stage_is_one_file_and_one_line(with_toy: Path, tiny_base: Path, tmp_path: Path) -> None:
    assert len(TOY.read_text().splitlines()) <= 60
    tree = tiny_tree(tiny_base, tmp_path)
    data = {**tree["stages"]["sft"]["data"], "test": 0.25}
    tree["stages"] = {"toy": {"data": data, "train": {"max_steps": 3}}}
    tree["train"], tree["expect"] = {}, {"toy.loss": "< 100"}
    recipe = str(write_recipe(tree, tmp_path / "recipe.yaml"))
    assert "sound, 1 stage: toy" in onebase(with_toy, with_toy, "check", recipe)
    assert "toy" in onebase(with_toy, with_toy, "plan", recipe, "--gpu", "rtx3060")
    onebase(with_toy, with_toy, "run", recipe)
    manifest = json.loads((with_toy / "runs" / "tiny" / "toy" / "manifest.json").read_text())
    assert manifest["kind"] == "toy" and manifest["after"]["loss"] < manifest["before"]["loss"]
    shown = onebase(with_toy, with_toy, "status", recipe)
    assert "fresh, skipped" in shown and "dialogue loss" in shown
    rows = onebase(with_toy, with_toy, "data", recipe)
    assert "toy (toy)" in rows and "end of turn learnt" in rows
    assert "loss" in onebase(with_toy, with_toy, "data", recipe, "toy", "--show", "1")
    assert "dialogue loss" in onebase(with_toy, with_toy, "eval", recipe)
    onebase(with_toy, with_toy, "report", recipe)
    page = (with_toy / "runs" / "tiny" / "report" / "report.md").read_text(encoding="utf-8")
    assert re.search(r"\*\*toy\*\* \((better|worse|no clear change)\)", page), page[:2000]
    onebase(with_toy, with_toy, "publish", recipe, "toy", "--as", "merged", "--to", str(tmp_path / "published"))
    card = (tmp_path / "published" / "README.md").read_text(encoding="utf-8")
    assert "| toy | dialogue loss |" in card
    for wrong, says in (
        ("stages.toy.train.max_step=3", "unknown key; did you mean 'max_steps'"),
        ("stages.toy.train.max_steps=0", "greater than or equal to 1"),
        ("stages.toy.reward=toy", "a toy stage takes no reward; only ppo, grpo, rejection_sampling may"),
        ("expect.toy={accuracy: '> 0'}", "toy does not give this number"),
    ):
        assert says in onebase(with_toy, with_toy, "check", recipe, "-o", wrong, status=2)

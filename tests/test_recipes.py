"""Every shipped recipe is sound, and the commands of docs/commands.md do what they say."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, typed

from pipeline.recipe.recipe import read
from pipeline.stages.check import check_arguments

RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if "accelerate" not in path.parts)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_sound(path: Path) -> None:
    recipe = read(path)
    check_arguments(recipe.spec.model, recipe.stages, recipe.spec.seed)
    first = path.read_text(encoding="utf-8").splitlines()[:6]
    assert any(f"onebase run {path.relative_to(ROOT)}" in line for line in first), "opens with the command that runs it"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_configs_are_what_accelerate_reads(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]


def shown_commands() -> list[str]:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    block = re.search(r"# Commands\n\n```\n(.*?)```", page, re.DOTALL)
    assert block
    return [line.split(" #")[0].strip() for line in block[1].splitlines()]


def test_the_commands_of_the_docs(tiny_base: Path, tmp_path: Path) -> None:
    """Each is typed as it stands, with a tiny base and two steps a stage in place of the demo model."""
    small = ["-o", f"model.base={tiny_base}", "-o", "train.max_steps=2", "-o", "train.max_length=512"]
    small += ["-o", "stages.ppo.train.steps=2", "-o", "stages.ppo.train.batch_size=8"]
    said = {}
    for command in shown_commands():
        words = shlex.split(command)
        assert words[0] == "onebase"
        if words[1] == "cp":
            words[-1] = str(tmp_path / words[-1])
        elif words[1] in ("chat", "compare"):  # these take folders of runs
            words = [str(tmp_path / word) if word.startswith("runs/") else word for word in words]
            if words[1] == "compare":
                shutil.copytree(words[2], words[3])
        elif words[1] != "ls":
            words += small if words[1] == "check" else [*small, "--runs", str(tmp_path / "runs")]
        if words[1] in ("check", "data", "plan", "report") or words[1] == "status" and "--json" not in words:
            said[command] = typed(*words[1:])
            continue
        wide = {**os.environ, "COLUMNS": "160"}
        command_line = [sys.executable, "-m", "pipeline", *words[1:]]
        shown = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, env=wide, input="")
        assert shown.returncode == 0, f"{command}\n{shown.stdout}\n{shown.stderr}"
        said[command] = shown.stdout
    assert "quickstart" in said["onebase ls"] and (tmp_path / "my.yaml").exists()
    assert "sound, 5 stages: pretrain -> sft -> reward -> dpo -> ppo" in said["onebase check recipes/quickstart.yaml"]
    assert said["onebase plan recipes/quickstart.yaml"].count("new, would run") == 5
    whole = said["onebase run recipes/quickstart.yaml"]
    for shown_to_a_person in (
        "comparisons ranked right",
        "Q: ",
        "base",
        "onebase status",
        "Adapters, manifests, logs",
        "in short",
    ):
        assert shown_to_a_person in whole
    only = said["onebase run recipes/quickstart.yaml --only dpo -o stages.dpo.train.beta=0.05"]
    assert "[1/1] dpo: stale, train.beta was 0.1, is 0.05" in only
    assert "sft: fresh" in said["onebase run recipes/quickstart.yaml --from sft"]
    folder = tmp_path / "runs" / "quickstart"
    machine = json.loads(said["onebase eval recipes/quickstart.yaml --json"])
    assert machine["results"] == json.loads((folder / "evaluation" / "results.json").read_text())
    machine = json.loads(said["onebase status recipes/quickstart.yaml --json"])
    for name, stage in machine["stages"].items():
        assert stage["manifest"] == json.loads((folder / name / "manifest.json").read_text())
        assert set(stage["metrics"]) & stage["manifest"]["after"].keys()


def test_all_fresh_takes_under_two_seconds(tiny_base: Path, tmp_path: Path) -> None:
    import time

    from conftest import tiny_tree, write_recipe

    from pipeline.recipe.recipe import build
    from pipeline.runs.stage import run_stage

    tree = tiny_tree(tiny_base, tmp_path)
    tree["stages"] = {"pretrain": tree["stages"]["pretrain"]}
    run_stage(build(tree), "pretrain", tmp_path)
    path = write_recipe(tree, tmp_path / "r.yaml")
    again = [sys.executable, "-m", "pipeline", "run", str(path), "--runs", str(tmp_path)]
    took = []
    for _ in range(3):
        begun = time.perf_counter()
        shown = subprocess.run(again, cwd=ROOT, capture_output=True, text=True)
        took.append(time.perf_counter() - begun)
        assert "everything asked for is fresh" in shown.stdout
    assert min(took) < 2


@pytest.mark.parametrize(
    ("reference", "answer", "told"),
    [
        (
            "recipes/rewards/number.py:right", "12",
            {"12": 1, "It is 12.": 1, "13": 0, "I do not know": 0, "7 + 5 = 12": 0, "-12": 0},
        ),
        (
            "recipes/rewards/fact.py:right", "green",
            {"It is green.": 1, "GREEN": 1, "It is white.": 0, "green or white": 0, "Soap and green": 1, "": 0},
        ),
        (
            "recipes/rewards/fact.py:right", None,
            {"I won't help with that.": 1, "I’d rather not.": 1, "It is green.": 0, "Sure, they cannot read.": 0},
        ),
    ],
)  # fmt: skip
def test_shipped_rewards_pay_for_right_answers_only(reference: str, answer: str | None, told: dict[str, int]) -> None:
    from pipeline.models.own_code import load_named

    completions = [[{"role": "assistant", "content": text}] for text in told]
    scores = load_named(reference, "reward")(
        completions=completions, answer=[answer] * len(told), prompts=[[]] * len(told)
    )
    assert scores == list(told.values())

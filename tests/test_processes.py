"""Two processes learn what one learns that accumulates: they share the rows, and what differs is the order of sums."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, launch, write_recipe
from safetensors.torch import load_file
from test_ppo_stage import ppo_tree

STEPS, ROWS = 3, 2
LEARNING = {
    "max_steps": STEPS, "per_device_train_batch_size": ROWS, "learning_rate": 1e-3,
    "train_sampling_strategy": "sequential",
}  # fmt: skip
PAID = {"from": "sft", "reward": "reward"}


def stage_of(kind: str, tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    prompts = tree["stages"]["ppo"]["data"]
    if kind == "rejection_sampling":
        sampling = {"num_generations": 8, "generation_batch_size": 64, "max_completion_length": 16}
        return {"kind": kind, **PAID, "data": prompts, "sampling": sampling, "train": LEARNING}
    if kind == "reward":
        return {**tree["stages"]["reward"], "kind": kind, "heads": 3, "train": LEARNING}
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [
        {"prompt": pair["prompt"], "completion": pair[which], "label": which == "chosen"}
        for pair in pairs
        for which in ("chosen", "rejected")
    ]
    thumbs = folder / "thumbs.jsonl"
    thumbs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"kind": kind, "from": "sft", "data": {"path": str(thumbs)}, "train": {**LEARNING, "loss_type": LOSS}}


LOSS = "apo_zero_unpaired"
"""Each answer by itself. With loss_type kto a batch is judged by its own answers, of all processes together."""


TRAIN = """
import sys
from pathlib import Path
from pipeline.recipe.recipe import read
from pipeline.runs.stage import run_stage
for stage in sys.argv[3:]:
    run_stage(read(sys.argv[1]), stage, Path(sys.argv[2]))
"""
KINDS = ("rejection_sampling", "reward", "kto")


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each kind trained by one process and by two, in float32: in bfloat16 the rows beside a token may turn it."""
    folder = tmp_path_factory.mktemp("processes")
    os.chdir(ROOT)
    tree = ppo_tree(tiny_base, folder)
    tree["model"]["dtype"] = "float32"
    for kind in KINDS:
        section = stage_of(kind, tree, folder)
        alone = {**section, "train": {**section["train"], "gradient_accumulation_steps": 2}}
        tree["stages"] |= {f"{kind}_one": alone, f"{kind}_two": section}
    del tree["stages"]["ppo"]
    path = write_recipe(tree, folder / "processes.yaml")
    script = folder / "train.py"
    script.write_text(TRAIN)
    launch(1, script, path, folder / "runs", "sft", "reward", *(f"{kind}_one" for kind in KINDS))
    launch(2, script, path, folder / "runs", *(f"{kind}_two" for kind in KINDS))
    return folder / "runs/tiny"


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one_that_accumulates(folder: Path, kind: str) -> None:
    one, two, sft = (folder / name for name in (f"{kind}_one", f"{kind}_two", "sft"))
    if kind == "rejection_sampling":
        assert (one / "kept.jsonl").read_text() == (two / "kept.jsonl").read_text() != ""
    before, found = (json.loads((stage / "manifest.json").read_text()) for stage in (one, two))
    assert found["invariants"]["processes"] == 2 and found["invariants"]["adapters_equal_on_all_processes"]
    assert found["before"] == pytest.approx(before["before"], abs=1e-4)
    ends = {stage: load_file(stage / "adapter/adapter_model.safetensors") for stage in (one, two, sft)}
    shared = [name for name in ends[one] if name in ends[sft]]
    moved = sum(float((ends[one][name] - ends[sft][name]).abs().sum()) for name in shared)
    apart = sum(float((ends[one][name] - ends[two][name]).abs().sum()) for name in ends[one])
    assert moved > 0 and apart < 0.01 * moved

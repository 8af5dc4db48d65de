"""Two processes learn what one learns that accumulates: they share the rows, and what differs is the order of sums."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_recipe
from safetensors.torch import load_file
from test_ppo import parents, ppo_tree  # noqa: F401

from pipeline.recipe.recipe import read
from pipeline.runs.stage import run_stage

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


@pytest.mark.parametrize("kind", ["rejection_sampling", "reward", "kto"])
def test_two_processes_are_one_that_accumulates(tiny_base: Path, parents: Path, kind: str) -> None:  # noqa: F811
    tree = ppo_tree(tiny_base, parents)
    section = stage_of(kind, tree, parents)
    del tree["stages"]["ppo"]
    alone = {**section, "train": {**section["train"], "gradient_accumulation_steps": 2}}
    tree["stages"] |= {f"{kind}_one": alone, f"{kind}_two": section}
    path = write_recipe(tree, parents / f"{kind}.yaml")
    said = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "pipeline.runs.worker", str(path), f"{kind}_two", "--runs", str(parents / "runs")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, timeout=180,
    )  # fmt: skip
    assert said.returncode == 0, said.stdout + said.stderr
    run_stage(read(str(path)), f"{kind}_one", parents / "runs")

    one, two = (parents / "runs/tiny" / f"{kind}_{count}" for count in ("one", "two"))
    if kind == "rejection_sampling":
        assert (one / "kept.jsonl").read_text() == (two / "kept.jsonl").read_text() != ""
    found = json.loads((two / "manifest.json").read_text())
    assert found["invariants"]["processes"] == 2 and found["invariants"]["adapters_equal_on_all_processes"]
    before, ends = json.loads((one / "manifest.json").read_text()), {}
    assert found["before"] == pytest.approx(before["before"], abs=1e-4)
    for folder in (one, two, parents / "runs/tiny/sft"):
        ends[folder] = load_file(folder / "adapter/adapter_model.safetensors")
    shared = [name for name in ends[one] if name in ends[parents / "runs/tiny/sft"]]
    moved = sum(float((ends[one][name] - ends[parents / "runs/tiny/sft"][name]).abs().sum()) for name in shared)
    apart = sum(float((ends[one][name] - ends[two][name]).abs().sum()) for name in ends[one])
    assert moved > 0 and apart < 0.01 * moved

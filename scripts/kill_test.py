"""Kill a chain with SIGKILL at random moments, run it to its end, and compare its adapters with an unbroken run's.

    python scripts/kill_test.py [--kills 10] [--seed 1] [--recipe RECIPE] [--stage ppo]

Without a recipe it makes a tiny base and runs pretrain, sft, reward, dpo and ppo on it (some minutes on 2 CPU cores).
With --stage only that stage is killed, on finished parents.
Every second kill hits the runner alone, the others the worker with its launcher, as the out-of-memory killer would.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from make_tiny_base import make_tiny_base

from pipeline.disk.atomic import sha256_of_file
from pipeline.recipe.recipe import Recipe, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--recipe")
    parser.add_argument("--stage")
    given = parser.parse_args()
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as scratch:
        path = given.recipe or str(_tiny_recipe(Path(scratch)))
        recipe = read(path)
        begun = time.monotonic()
        _start(path, Path(scratch) / "unbroken").wait()
        whole = time.monotonic() - begun
        if given.stage:
            broken = Path(scratch) / "broken" / recipe.name
            shutil.copytree(Path(scratch) / "unbroken" / recipe.name, broken)
            whole = recipe.artifact(given.stage, Path(scratch) / "broken").finished().seconds
            shutil.rmtree(broken / given.stage)
        print(f"unbroken: {whole:.0f} s")
        for kill in range(given.kills):
            _run_and_kill(path, recipe, Path(scratch) / "broken", chance.uniform(0.05, 0.25) * whole, kill % 2 == 0)
        status = _start(path, Path(scratch) / "broken").wait()
        if status:
            sys.exit(f"the last run ended with status {status}")
        _compare(recipe, Path(scratch))


def _tiny_recipe(folder: Path) -> Path:
    base = make_tiny_base(folder / "base")
    pairs = {"path": "data/comparisons.jsonl", "limit": 120}
    tree = {
        "name": "kill-test",
        "model": {"base": str(base), "lora": {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}},
        "train": {
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
            "train_sampling_strategy": "group_by_length",
            "max_length": 128,
            "learning_rate": 1e-3,
            "num_train_epochs": 2,
            "save_steps": 5,
        },
        "stages": {
            "pretrain": {"data": {"path": "data/corpus.jsonl"}},
            "sft": {"from": "pretrain", "data": {"path": "data/demonstrations.jsonl", "limit": 160}},
            "reward": {"from": "sft", "data": pairs},
            "dpo": {"from": "sft", "data": pairs},
            "ppo": {
                "from": "sft",
                "reward": "reward",
                "data": {"path": "data/prompts.jsonl"},
                "train": {"steps": 30, "batch_size": 16, "response_length": 48, "save_steps": 1},
            },
        },
    }
    path = folder / "kill-test.yaml"
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")
    return path


def _start(path: str, runs: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline", "run", path, "--runs", str(runs)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def _run_and_kill(path: str, recipe: Recipe, runs: Path, after: float, runner_alone: bool) -> None:
    process = _start(path, runs)
    deadline = time.monotonic() + after
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    if process.poll() is not None:
        print(f"  done already after {after:.1f} s")
        return
    stage = next((name for name in recipe.order() if recipe.artifact(name, runs).manifest() is None), "none")
    if runner_alone:
        process.send_signal(signal.SIGKILL)
    else:
        for worker in _workers(process.pid):
            os.kill(worker, signal.SIGKILL)
    process.wait()
    print(f"  killed {'the runner' if runner_alone else 'the worker'} in {stage} after {after:.1f} s", flush=True)


def _workers(runner: int) -> list[int]:
    """All processes started below the runner."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue  # it ended meanwhile
    below = {runner}
    for _ in range(5):
        below |= {child for child, parent in parents.items() if parent in below}
    return sorted(below - {runner}, reverse=True)


def _compare(recipe: Recipe, scratch: Path) -> None:
    unequal = 0
    for name in recipe.order():
        first, second = (
            sha256_of_file(recipe.artifact(name, scratch / side).adapter / "adapter_model.safetensors")
            for side in ("unbroken", "broken")
        )
        print(f"{name:<10} {first[:16]}  {second[:16]}  {'equal' if first == second else 'DIFFERENT'}")
        unequal += first != second
    sys.exit(1 if unequal else 0)


if __name__ == "__main__":
    main()

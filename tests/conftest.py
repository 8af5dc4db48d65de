"""A tiny base for the true NF4 path on the CPU: made here, no download, vocabulary of 512."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# trackio reads it when it is imported, which other libraries do too.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")
atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from make_tiny_base import make_tiny_base
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.disk.atomic import digest
from pipeline.disk.manifest import Data, Manifest, Parent, Parts
from pipeline.language.say import speak
from pipeline.recipe.recipe import Recipe

LONGEST = [
    "resume",
    "recipes",
    "publish",
    "publish_hub",
    "toy_stage",
    "publish_classifier",
    "out_of_memory",
    "ppo_stage",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: of two workers none is left with one of them at the end."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _in_english() -> Iterator[None]:
    yield
    speak("en")  # whatever a test has asked for


def head(file: str, rows: int, to: Path) -> str:
    """The first rows of a demo file."""
    lines = (ROOT / "data" / file).read_text(encoding="utf-8").splitlines()[:rows]
    to.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(to)


def seal(recipe: Recipe, stage: str, runs: Path, after: dict[str, float], **more: Any) -> None:
    """Seal a stage's folder as its worker does, with these numbers; `more` stands for other fields of the manifest."""
    parts, artifact = recipe.parts()[stage], recipe.artifact(stage, runs)
    parents = {}
    for role, parent in recipe.parents(stage).items():
        sealed = recipe.artifact(parent, runs).verify()
        adapter = sealed.files["adapter_model.safetensors"]
        parents[role] = Parent(stage=parent, fingerprint=sealed.fingerprint, adapter=adapter)
    whole = Manifest(
        stage=stage, kind=recipe.stages[stage].kind, fingerprint=digest(parts), parts=Parts(**parts),
        section=recipe.stages[stage].model_dump(by_alias=True), parents=parents, base=recipe.spec.model.base,
        base_hash=parts["model"]["base"], base_digest="", seed=recipe.spec.seed, before={}, after=after,
        data=Data(sources=[], held_out=None, questions=0, counts={}, measured_on=recipe.measured_on(stage)),
        dtype="bfloat16", invariants={}, processes=1, versions_changed={}, started="", seconds=1.0, device="cpu",
        peak_memory_mib=1, peak_memory_is="", energy_wh=None, energy_of="", versions={},
    )  # fmt: skip
    artifact.seal(whole.model_copy(update=more))


def tiny_tree(base: Path, folder: Path, name: str = "tiny") -> dict[str, Any]:
    """A whole chain of a few steps."""
    data = {
        "corpus": head("corpus.jsonl", 24, folder / "corpus.jsonl"),
        "dialogues": head("demonstrations.jsonl", 32, folder / "dialogues.jsonl"),
        "pairs": head("comparisons.jsonl", 24, folder / "pairs.jsonl"),
        "test": head("comparisons_test.jsonl", 8, folder / "pairs_test.jsonl"),
        "questions": head("questions.jsonl", 4, folder / "questions.jsonl"),
    }
    pairs = {"path": data["pairs"], "test": data["test"]}
    return {
        "name": name,
        "seed": 7,
        "model": {
            "base": str(base), "dtype": "bfloat16",
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        },
        "train": {
            "per_device_train_batch_size": 4, "gradient_checkpointing": False, "max_length": 128,
            "logging_steps": 1, "save_steps": 2, "learning_rate": 1e-3, "train_sampling_strategy": "group_by_length",
        },
        "stages": {
            "pretrain": {"data": {"path": data["corpus"], "test": 0.25}, "train": {"num_train_epochs": 1}},
            "sft": {
                "from": "pretrain", "data": {"path": data["dialogues"]}, "questions": data["questions"],
                "train": {"num_train_epochs": 1},
            },
            "reward": {"from": "sft", "data": pairs, "train": {"num_train_epochs": 1}},
            "dpo": {"from": "sft", "data": pairs, "train": {"num_train_epochs": 1, "beta": 0.1}},
        },
    }  # fmt: skip


def write_recipe(tree: dict[str, Any], path: Path) -> Path:
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def onebase(package: Path, folder: Path, *words: str, status: int = 0) -> str:
    """What a command prints, typed in a folder, of the package that lies in another. Its exit status is demanded."""
    environment = {**os.environ, "PYTHONPATH": str(package), "COLUMNS": "160"}
    command = [sys.executable, "-m", "pipeline", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def typed(*words: str) -> str:
    """What a command prints that is run in this process, which has loaded its libraries already."""
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


ON_TWO = """
import importlib, json, sys
from accelerate import PartialState
sys.path[:0] = ["tests", "scripts"]
state = PartialState(cpu=True)
module, function, base, folder = sys.argv[1:]
found = getattr(importlib.import_module(module), function)(base)
json.dump(found, open(f"{folder}/{state.process_index}.json", "w"))
state.destroy_process_group()
"""


def launch(processes: int, *command: str | Path) -> None:
    """Run a program as torch starts it on so many processes, each with one thread: one process adds up as two do."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *command],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def launch_stage(processes: int, recipe: Path, stage: str, runs: Path) -> None:
    launch(processes, "-m", "pipeline.runs.worker", recipe, stage, "--runs", runs)


def on_two_processes(module: str, function: str, base: Path, folder: Path) -> list[Any]:
    """What a test module's function gives in each of two processes that share the work."""
    (folder / "on_two.py").write_text(ON_TWO)
    launch(2, folder / "on_two.py", module, function, base, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]

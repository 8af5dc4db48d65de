"""Killed and resumed equals never killed, through the command line; one run at a time."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, tiny_tree, write_recipe

from pipeline.cli import app
from pipeline.disk.artifact import Artifact, mark_checkpoint
from pipeline.disk.atomic import digest, write_json
from pipeline.errors import UserError
from pipeline.recipe.recipe import read
from pipeline.runs.environment import make_environment
from pipeline.runs.runner import run
from pipeline.runs.stage import run_stage
from pipeline.runs.states import states
from pipeline.training import progress, trainer

ONEBASE = [sys.executable, "-m", "pipeline", "run"]


def recipe(base: Path, folder: Path, epochs: int = 3) -> Path:
    tree = tiny_tree(base, folder)
    tree["stages"] = {name: tree["stages"][name] for name in ("sft", "dpo")}
    tree["stages"]["sft"].pop("from")
    tree["stages"]["sft"].pop("questions")
    tree["stages"]["sft"]["train"] = {"num_train_epochs": epochs}
    tree["stages"]["dpo"].pop("questions", None)
    tree["train"]["save_steps"] = 1
    tree["model"]["lora"]["lora_dropout"] = 0.1  # the random state must come back too
    return write_recipe(tree, folder / "recipe.yaml")


def start(path: Path, runs: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*ONEBASE, str(path), "--runs", str(runs)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def finished(path: Path, runs: Path) -> str:
    process = start(path, runs)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def adapter_bytes(runs: Path, stage: str) -> bytes:
    return (runs / "tiny" / stage / "adapter" / "adapter_model.safetensors").read_bytes()


def wait_for(something: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not something.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def test_killed_at_random_moments_equals_unbroken(tiny_base: Path, tmp_path: Path) -> None:
    path = recipe(tiny_base, tmp_path)
    finished(path, tmp_path / "unbroken")
    broken = tmp_path / "broken"
    chance = random.Random(5)
    resumed = ""
    for stage, step, whole_group in (("sft", 3, False), ("sft", 9, True), ("dpo", 2, False)):
        process = start(path, broken)
        folder = broken / "tiny" / stage
        wait_for(folder / "checkpoints" / f"checkpoint-{step}", process)
        time.sleep(chance.random() * 0.5)
        if whole_group:  # the worker and its launcher, as the out-of-memory killer would
            worker = int((Artifact(folder).claimed() or {})["pid"])
            os.killpg(os.getpgid(worker), signal.SIGKILL)
        else:  # the runner alone: its worker must not go on behind anyone's back
            process.send_signal(signal.SIGKILL)
        resumed += process.communicate(timeout=120)[0]
    resumed += finished(path, broken)
    assert "going on from step" in resumed
    for stage in ("sft", "dpo"):
        assert adapter_bytes(broken, stage) == adapter_bytes(tmp_path / "unbroken", stage)


STEERED = {
    "steps": 8, "batch_size": 16, "mini_batch_size": 8, "kl_target": 0.5, "normalize_reward": "running",
    "sft_coef": 0.5,
}  # fmt: skip
GROUPED = {"max_steps": 8, "generation_batch_size": 16, "num_generations": 4, "beta": 0.1, "max_num_gen_batches": 2}


@pytest.mark.parametrize(
    ("kind", "train"),
    [
        # Long enough that now and then a random model ends an answer; else its health stops the run.
        ("ppo", {**STEERED, "response_length": 48}),
        ("grpo", {**GROUPED, "max_completion_length": 48}),
    ],
)
def test_a_killed_ppo_or_grpo_stage_equals_an_unbroken_one(
    tiny_base: Path, tmp_path: Path, kind: str, train: dict[str, Any]
) -> None:
    tree = tiny_tree(tiny_base, tmp_path)
    tree["stages"] = {name: tree["stages"][name] for name in ("sft", "reward")}
    tree["stages"]["sft"].pop("from")
    tree["stages"][kind] = {
        "from": "sft", "reward": "reward", "data": {"path": "data/prompts.jsonl"},
        "train": {**train, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_steps": 1},
    }  # fmt: skip
    path = write_recipe(tree, tmp_path / "recipe.yaml")
    finished(path, tmp_path / "unbroken")
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "tiny" / kind)
    chance, resumed = random.Random(6), ""
    for step in (2, 5):
        process = start(path, tmp_path / "broken")
        wait_for(tmp_path / "broken" / "tiny" / kind / "checkpoints" / f"checkpoint-{step}", process)
        time.sleep(chance.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        resumed += process.communicate(timeout=120)[0]
    resumed += finished(path, tmp_path / "broken")
    assert "going on from step" in resumed
    assert adapter_bytes(tmp_path / "broken", kind) == adapter_bytes(tmp_path / "unbroken", kind)


def test_ctrl_c_saves_and_says_how_to_go_on_and_a_second_run_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    path = recipe(tiny_base, tmp_path, epochs=300)  # it must not end before it is stopped
    first = start(path, tmp_path)
    wait_for(tmp_path / "tiny" / "sft" / "checkpoints" / "checkpoint-2", first)
    second = start(path, tmp_path)
    refused, _ = second.communicate(timeout=60)
    assert second.returncode == 2 and "already going on in process" in refused
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 130
    assert "a checkpoint was saved" in said and f"onebase run {path}" in said
    shown = subprocess.run(
        [sys.executable, "-m", "pipeline", "plan", str(path), "--runs", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert "stopped" in shown.stdout and "goes on from step" in shown.stdout


def test_a_checkpoint_of_another_number_of_processes_is_refused(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step would learn from another number of rows. A finished stage stays fresh, however many there are."""
    chain = read(recipe(tiny_base, tmp_path, epochs=1))
    sft = chain.artifact("sft", tmp_path)
    with monkeypatch.context() as planted:
        planted.setattr(trainer, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_stage(chain, "sft", tmp_path)
    held = sft.claimed() or {}
    assert held["processes"] == 1 and sft.last_checkpoint(held["fingerprint"])
    write_json(sft.folder / "claim.json", {**held, "processes": 2})  # as two leave it
    assert states(chain, tmp_path)[0].why.endswith(", with 2 processes")
    with pytest.raises(UserError, match="was made by 2 processes, and here there are 1: .* or delete .*checkpoints"):
        run_stage(chain, "sft", tmp_path)
    assert sft.last_checkpoint(held["fingerprint"])
    write_json(sft.folder / "claim.json", held)
    run_stage(chain, "sft", tmp_path)
    manifest = sft.verify()
    assert manifest.processes == 1
    sft.seal(manifest.model_copy(update={"processes": 2}))
    assert states(chain, tmp_path)[0].word == "fresh"


KILLED = """import os, signal, sys
if "pipeline.runs.worker" in sys.orig_argv and "accelerate.commands.launch" not in sys.orig_argv:
    print("the worker's last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


LAUNCHED = "distributed_type: 'NO'\nnum_processes: 1\nnum_machines: 1\nmixed_precision: 'no'\nuse_cpu: true\n"


@pytest.mark.parametrize("launched", [False, True])
def test_a_killed_stage_says_whether_there_is_a_checkpoint(
    launched: bool, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(KILLED)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    path = recipe(tiny_base, tmp_path)
    chain = read(path)
    config = tmp_path / "accelerate.yaml"
    config.write_text(LAUNCHED)
    with pytest.raises(UserError) as ended:
        run(chain, runs=tmp_path, launch_config=config if launched else None)
    said, sft = str(ended.value), chain.artifact("sft", tmp_path)
    assert "No checkpoint had been written: run again, and the stage begins anew" in said
    assert "the worker's last words" in said and "Traceback" not in said
    assert ("Traceback" in sft.log.read_text()) == launched  # the launcher's own, which helps nobody

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.runs.runner.run", interrupted)
    for told in ("No checkpoint had been written, so the stage begins anew", "To go on from there"):
        with pytest.raises(SystemExit) as stopped:
            app(["run", str(path), "--runs", str(tmp_path)])
        assert stopped.value.code == 130 and told in capsys.readouterr().err
        (sft.checkpoints / "checkpoint-2").mkdir(parents=True, exist_ok=True)
        mark_checkpoint(sft.checkpoints / "checkpoint-2", digest(chain.parts()["sft"]))


def test_sigterm_ends_the_worker_too_after_a_checkpoint(tiny_base: Path, tmp_path: Path) -> None:
    """Else the worker would go on while the lock is free, and a second run would write beside it."""
    process = start(recipe(tiny_base, tmp_path, epochs=300), tmp_path)
    folder = tmp_path / "tiny" / "sft"
    wait_for(folder / "checkpoints" / "checkpoint-2", process)
    worker = int((Artifact(folder).claimed() or {})["pid"])
    process.terminate()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "a checkpoint was saved" in said
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_checkpoint_is_trusted_whole_and_under_its_fingerprint_only(tmp_path: Path) -> None:
    stage = Artifact(tmp_path / "sft")
    for step in (2, 4, 6, 10):
        (stage.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        (stage.checkpoints / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"state")
    mark_checkpoint(stage.checkpoints / "checkpoint-2", "ours")
    mark_checkpoint(stage.checkpoints / "checkpoint-4", "ours")
    mark_checkpoint(stage.checkpoints / "checkpoint-6", "ours")
    (stage.checkpoints / "checkpoint-6" / "optimizer.pt").write_bytes(b"stat")  # damaged afterwards
    assert stage.last_checkpoint("ours") == stage.checkpoints / "checkpoint-4"  # 10 was cut short
    assert stage.last_checkpoint("theirs") is None
    stage.claim("theirs", {})
    assert not stage.checkpoints.exists()


def test_a_signal_that_a_launcher_passes_on_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches the processes of a run and their launcher, which sends it to them again at once, or SIGTERM."""
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    stop = progress.Stop()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        clock[0] += 5.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_launcher_of_several_processes_waits_for_their_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own limit is 30 seconds; it reads another from the environment that the runner gives."""
    from torch.distributed.launcher.api import LaunchConfig

    assert LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2).shutdown_timeout == 30
    for name, value in make_environment().items():
        monkeypatch.setenv(name, value)
    assert LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2).shutdown_timeout == 3600

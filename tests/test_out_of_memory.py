"""Out of memory halves the micro-batch and repeats the same optimizer step; the adapter is what it would have been.

The CPU has no memory limit to run into, so one is planted: a forward pass of more tokens than allowed raises what CUDA
raises, and so does, on occasion, a backward pass that has added part of its gradients.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, tiny_tree, write_recipe
from safetensors.torch import load_file

from pipeline.errors import UserError
from pipeline.models import adapters
from pipeline.models.halving import in_halves
from pipeline.ppo.splitting import sampled
from pipeline.ppo.trainer import PPOTrainer
from pipeline.recipe import build
from pipeline.stages.splitting import SplitsWhenFull
from pipeline.worker import run_stage

READY = adapters._ready


def plant(monkeypatch: pytest.MonkeyPatch, tokens: int | None, backward: bool = False) -> None:
    """A model whose passes hold so many tokens at most. With `backward`, a larger one fails only half-way back."""

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. (planted)")

    def limited(model: Any) -> Any:
        layers = [m for m in READY(model).modules() if hasattr(m, "self_attn") and hasattr(m, "mlp")]

        def entered(layer: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            sampling = kwargs.get("past_key_values") is not None
            if sampling or tokens is None or hidden.shape[0] * hidden.shape[1] <= tokens:
                return
            if backward and hidden.requires_grad:
                hidden.register_hook(full)
            elif not backward:
                full()

        # The hook on the last layer's input fires once that layer's adapter has been given its gradients.
        layers[-1].register_forward_pre_hook(entered, with_kwargs=True)
        return model

    monkeypatch.setattr(adapters, "_ready", limited)


def trained(tree: dict[str, Any], runs: Path, stage: str) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[Any]]:
    recipe = build(tree)
    for name in recipe.order():
        if not (runs / "tiny" / name / "manifest.json").exists():
            run_stage(recipe, name, runs)
    folder = runs / "tiny" / stage
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((folder / "manifest.json").read_text())
    return load_file(folder / "adapter" / "adapter_model.safetensors"), manifest, lines


def tree_of(base: Path, folder: Path, stage: str, **train: Any) -> dict[str, Any]:
    tree = tiny_tree(base, folder)
    tree["model"] |= {"dtype": "float32", "quantize": "none"}
    section = {**tree["stages"][stage]}
    section.pop("from", None)
    section.pop("questions", None)
    steps = {"max_steps": 3, "gradient_accumulation_steps": 2, **train}
    tree["stages"] = {stage: {**section, "train": {**section["train"], **steps}}}
    return tree


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo"])
def test_a_limit_changes_no_adapter(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, backward: bool
) -> None:
    tree = tree_of(tiny_base, tmp_path, stage)
    free, _, unhindered = trained(tree, tmp_path / "free", stage)
    limit = {"pretrain": 300, "sft": 200, "reward": 300, "dpo": 300}[stage]
    plant(monkeypatch, limit, backward)
    limited, manifest, lines = trained(tree, tmp_path / "limited", stage)
    assert manifest["data"]["counts"]["rows_at_once"] < 4
    events = [line for line in lines if "out_of_memory" in line]
    assert events and all(event["rows_at_once"] == event["out_of_memory"] // 2 for event in events)
    assert free.keys() == limited.keys()
    worst = max((free[name] - limited[name]).abs().max().item() for name in free)
    assert worst < 1e-5
    losses = [[line["loss"] for line in told if "loss" in line] for told in (unhindered, lines)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_the_longest_batch_is_tried_first(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves nothing behind: the adapter is the one of a run that tried nothing."""
    tree = tree_of(tiny_base, tmp_path, "sft")
    free, _, _ = trained(tree, tmp_path / "free", "sft")
    monkeypatch.setattr(SplitsWhenFull, "probes", True)
    plant(monkeypatch, 200)
    probed, _, lines = trained(tree, tmp_path / "probed", "sft")
    assert [line["step"] for line in lines if "out_of_memory" in line] == [0]
    assert max((free[name] - probed[name]).abs().max().item() for name in free) < 1e-5


def test_a_row_too_long_says_what_to_change(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, 40, backward=True)
    with pytest.raises(UserError, match=r"one row of \d+ tokens .* Lower max_length to \d+, or set activation_checkpo"):
        trained(tree_of(tiny_base, tmp_path, "sft"), tmp_path, "sft")


PAYS = """
def pays(completions, **columns):
    return [float(len(c[0]["content"]) % 7) for c in completions]
"""


@pytest.mark.parametrize("critic", ["trunk", "adapter"])
def test_a_limit_changes_no_ppo_policy(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, critic: str
) -> None:
    (tmp_path / "pays.py").write_text(PAYS)
    rows = [
        {"prompt": [{"role": "user", "content": f"say {word}"}]} for word in ("a", "hundred words", "no", "yes it is")
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = tiny_tree(tiny_base, tmp_path)
    tree["model"] |= {"dtype": "float32", "quantize": "none"}
    tree["train"] = {}
    tree["stages"] = {
        "ppo": {
            "data": {"path": str(tmp_path / "prompts.jsonl")},
            "reward": f"{tmp_path}/pays.py:pays",
            "train": {
                "steps": 2, "batch_size": 8, "mini_batch_size": 8, "per_device_train_batch_size": 4, "critic": critic,
                "response_length": 12, "kl_stop": 1000.0, "gradient_checkpointing": False,
            },
        }
    }  # fmt: skip
    free, _, _ = trained(tree, tmp_path / "free", "ppo")
    for backward in (False, True):
        runs = tmp_path / f"limited-{backward}"
        plant(monkeypatch, 80, backward)
        monkeypatch.setattr(PPOTrainer, "probes", True)
        limited, manifest, lines = trained(tree, runs, "ppo")
        assert [line["step"] for line in lines if "out_of_memory" in line][0] == 0, "found before the first step"
        assert manifest["data"]["counts"]["rows_at_once"] in (1, 2)
        assert max((free[name] - limited[name]).abs().max().item() for name in free) < 1e-5


def test_two_processes_accumulate_to_one_adapter(tiny_base: Path, tmp_path: Path) -> None:
    """Gradients of earlier micro-batches must be there when DDP averages."""
    tree = tree_of(tiny_base, tmp_path, "sft", per_device_train_batch_size=2, max_steps=2)
    alone, _, _ = trained({**tree, "stages": {"sft": _accumulating(tree, 4)}}, tmp_path / "one", "sft")
    path = write_recipe(tree, tmp_path / "two.yaml")
    said = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "pipeline.worker", str(path), "sft", "--runs", str(tmp_path / "two")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, timeout=180,
    )  # fmt: skip
    assert said.returncode == 0, said.stdout + said.stderr
    folder = tmp_path / "two" / "tiny" / "sft"
    found = json.loads((folder / "manifest.json").read_text())["invariants"]
    assert found["processes"] == 2 and found["adapters_equal_on_all_processes"]
    together = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert max((alone[name] - together[name]).abs().max().item() for name in alone) < 1e-5


def _accumulating(tree: dict[str, Any], times: int) -> dict[str, Any]:
    section = tree["stages"]["sft"]
    return {**section, "train": {**section["train"], "gradient_accumulation_steps": times}}


def test_a_rollout_is_sampled_again_in_smaller_batches() -> None:
    tried: list[int] = []

    def sample(at_once: int) -> list[Any]:
        tried.append(at_once)
        if at_once > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. (planted)")
        return ["answers"]

    told: list[tuple[int, int]] = []
    assert sampled(sample, 9, lambda *pair: told.append(pair)) == (["answers"], 2)
    assert tried == [9, 4, 2] and told == [(9, 4), (4, 2)]


def _always_full(_: Any) -> list[Any]:
    raise torch.OutOfMemoryError("CUDA out of memory. (planted)")


def test_evaluation_in_halves_gives_the_same_numbers_in_the_same_order() -> None:
    def run(items: Any) -> list[int]:
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. (planted)")
        return [item * item for item in items]

    assert in_halves(run, range(11)) == [item * item for item in range(11)]
    with pytest.raises(UserError, match="one row of 11 tokens does not fit .* over 5 tokens"):
        in_halves(_always_full, [11], tokens=lambda item: item)
    with pytest.raises(UserError, match="Lower response_length"):
        sampled(_always_full, 2, lambda *_: None)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        in_halves(lambda items: int("x"), [1, 2])  # type: ignore[arg-type,return-value]

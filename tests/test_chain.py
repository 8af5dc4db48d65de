"""The whole chain on a true NF4 base: what is handed over is right, what is fresh is skipped, what is wrong stops."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tree
from make_tiny_base import make_tiny_base
from safetensors.torch import load_file

from pipeline.artifact import Artifact
from pipeline.errors import BrokenInvariant, UserError
from pipeline.models import adapters
from pipeline.recipe import Recipe, build
from pipeline.runner import run, states
from pipeline.worker import run_stage


@pytest.fixture(scope="module")
def chain(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Path]]:
    """A recipe's tree and the folder in which all its stages have run."""
    runs = tmp_path_factory.mktemp("runs")
    tree = tiny_tree(tiny_base, runs)
    recipe = build(tree)
    for stage in recipe.order():
        run_stage(recipe, stage, runs)
    yield tree, runs


def out(chain: tuple[dict[str, Any], Path], stage: str) -> Artifact:
    return build(chain[0]).artifact(stage, chain[1])


def words(recipe: Recipe, runs: Path) -> dict[str, str]:
    return {state.name: state.word for state in states(recipe, runs)}


def test_every_stage_leaves_a_manifest_that_accounts_for_its_rows(chain: tuple[dict[str, Any], Path]) -> None:
    for stage, rows in (("pretrain", 24 - 6), ("sft", 32), ("reward", 24), ("dpo", 24)):
        manifest = out(chain, stage).verify()
        assert manifest["data"]["counts"]["rows"] == rows
        assert manifest["invariants"]["base_unchanged"] is True
        assert manifest["invariants"]["trainable_dtype"] == "float32"
        assert manifest["after"] and not (out(chain, stage).folder / "checkpoints").exists()
    assert len({out(chain, stage).verify()["base_digest"] for stage in chain[0]["stages"]}) == 1


def test_the_reference_of_dpo_is_the_sft_policy(chain: tuple[dict[str, Any], Path]) -> None:
    found = out(chain, "dpo").verify()["invariants"]
    assert found["step_0_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert found["step_0_margin"] == 0
    assert list(out(chain, "dpo").snapshots()) == [2, 3, 4] and out(chain, "sft").snapshots() == {}  # of 6 steps
    files = {file.name for file in out(chain, "dpo").adapter.rglob("*") if file.is_file()}
    assert "adapter_model.safetensors" in files and not (out(chain, "dpo").adapter / "ref").exists()


def test_the_reward_model_is_the_sft_trunk_with_a_trained_head(chain: tuple[dict[str, Any], Path]) -> None:
    manifest = out(chain, "reward").verify()
    assert manifest["invariants"]["head_moved_by"] > 0
    assert manifest["invariants"]["reload_score_difference"] <= 1e-5
    saved = load_file(out(chain, "reward").adapter / adapters.WEIGHTS)
    assert any("score" in name for name in saved)
    assert json.loads((out(chain, "reward").adapter / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_each_stage_leaves_the_numbers_that_a_recipe_may_make_demands_of(chain: tuple[dict[str, Any], Path]) -> None:
    recipe = build(chain[0])
    for stage in recipe.order():
        after = out(chain, stage).verify()["after"]
        assert after and after.keys() <= set(recipe.kind(stage).numbers)


def test_each_stage_has_moved_its_parents_adapter(chain: tuple[dict[str, Any], Path]) -> None:
    recipe = build(chain[0])
    for child in ("sft", "reward", "dpo"):
        parent = recipe.parents(child)["policy"]
        before, after = (load_file(out(chain, stage).adapter / adapters.WEIGHTS) for stage in (parent, child))
        shared = before.keys() & after.keys()
        assert shared == before.keys()
        assert any((before[name] != after[name]).any() for name in shared)


def test_fresh_is_skipped_and_only_what_depends_on_a_change_is_stale(chain: tuple[dict[str, Any], Path]) -> None:
    tree, runs = chain
    fresh = dict.fromkeys(tree["stages"], "fresh")
    assert words(build(tree), runs) == fresh
    assert words(build(tree, ["stages.dpo.train.beta=0.2"]), runs) == {**fresh, "dpo": "stale"}
    reasons = {state.name: state.why for state in states(build(tree, ["stages.dpo.train.beta=0.2"]), runs)}
    assert reasons["dpo"] == "train.beta was 0.1, is 0.2"

    dialogues = Path(tree["stages"]["sft"]["data"]["path"])
    kept = dialogues.read_text(encoding="utf-8")
    dialogues.write_text(kept.replace("I ", "We ", 1), encoding="utf-8")
    try:
        found = {state.name: state for state in states(build(tree), runs)}
        assert {name: state.word for name, state in found.items()} == {
            **dict.fromkeys(tree["stages"], "stale"),
            "pretrain": "fresh",
        }
        assert found["sft"].why == "the file of data.path has changed"
        assert found["reward"].why == found["dpo"].why == "its parent (policy) has changed"
    finally:
        dialogues.write_text(kept, encoding="utf-8")


def copied(chain: tuple[dict[str, Any], Path], to: Path) -> tuple[Recipe, Path]:
    shutil.copytree(chain[1], to / "runs")
    return build(chain[0], ["stages.dpo.train.beta=0.2"]), to / "runs"


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_parent_is_refused(chain: tuple[dict[str, Any], Path], tmp_path: Path, damage: str) -> None:
    recipe, runs = copied(chain, tmp_path)
    weights = recipe.artifact("sft", runs).adapter / adapters.WEIGHTS
    content = bytearray(weights.read_bytes())
    if damage == "remove":
        weights.unlink()
    else:
        content[-1] ^= 1
        weights.write_bytes(content[: len(content) // 2] if damage == "truncate" else content)
    with pytest.raises(UserError, match=rf"{adapters.WEIGHTS} is (missing|corrupted or truncated)"):
        run_stage(recipe, "dpo", runs)
    assert recipe.artifact("dpo", runs).manifest() == out(chain, "dpo").manifest()
    assert words(recipe, runs)["sft"] == "damaged"
    with pytest.raises(UserError, match="to train it anew"):
        run(recipe, runs=runs)


def test_a_parent_of_another_base_is_refused(chain: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    _, runs = copied(chain, tmp_path)
    other = make_tiny_base(tmp_path / "other", seed=1)
    recipe = build(chain[0], [f"model.base={other}"])
    with pytest.raises(UserError, match="was trained on another base"):
        run_stage(recipe, "dpo", runs)


def test_a_stale_or_absent_parent_is_refused(chain: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sft is stale: recipe or data have changed"):
        run_stage(build(chain[0], ["stages.sft.train.learning_rate=1e-5"]), "dpo", chain[1])
    with pytest.raises(UserError, match="holds no finished stage"):
        run_stage(build(chain[0]), "dpo", tmp_path)
    with pytest.raises(UserError, match="'dpo' goes on from 'sft', which is new"):
        run(build(chain[0]), only=["dpo"], runs=tmp_path)


def test_what_is_refused_before_training_leaves_the_finished_stage_alone(
    chain: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    _, runs = copied(chain, tmp_path)
    before = build(chain[0]).artifact("dpo", runs).verify()
    for override in ("stages.dpo.train.loss_type=nope", "stages.dpo.train.max_length=3", "model.lora.r=four"):
        with pytest.raises(Exception, match="nope|fits max_length 3|four|stale"):
            run_stage(build(chain[0], [override]), "dpo", runs)
        assert build(chain[0]).artifact("dpo", runs).verify() == before


def test_a_child_of_another_result_is_stale(chain: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """The same inputs need not give the same bits on a GPU or with another library: what counts is the adapter."""
    _, runs = copied(chain, tmp_path)
    recipe = build(chain[0])
    sft = recipe.artifact("sft", runs)
    weights = sft.adapter / adapters.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    sft.seal({key: value for key, value in sft.manifest().items() if key != "files"})  # type: ignore[union-attr]
    assert words(recipe, runs) == {"pretrain": "fresh", "sft": "fresh", "reward": "stale", "dpo": "stale"}


def test_a_wrong_reference_stops_dpo_before_it_trains(
    chain: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: the reference copy is taken before the SFT adapter is there."""
    import torch

    from pipeline.stages import trainer as shared

    recipe, runs = copied(chain, tmp_path)
    honest = shared.build

    def faulty(*args: Any, **kwargs: Any) -> Any:
        trainer = honest(*args, **kwargs)
        with torch.no_grad():
            for name, weight in trainer.model.named_parameters():
                if ".ref." in name:
                    weight.zero_()
        return trainer

    monkeypatch.setattr(shared, "build", faulty)
    with pytest.raises(BrokenInvariant, match="a reference that is not the policy"):
        run_stage(recipe, "dpo", runs)
    assert recipe.artifact("dpo", runs).manifest() == out(chain, "dpo").manifest()


def test_a_full_disk_leaves_nothing_to_trust(chain: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """Files may not grow beyond 48 KiB: the adapter cannot be written, the stage is not done, and a second run is."""
    import resource
    import signal

    recipe, runs = copied(chain, tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (49152, before[1]))
        with pytest.raises(Exception, match="too large|I/O error|inline_container"):
            run_stage(recipe, "dpo", runs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    dpo = recipe.artifact("dpo", runs)
    assert dpo.manifest() is None and not dpo.adapter.exists() and not list(dpo.folder.glob("*.tmp"))
    run_stage(recipe, "dpo", runs)
    assert dpo.verify()

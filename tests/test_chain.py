"""The whole chain on a true NF4 base: what is handed over is right, what is fresh is skipped, what is wrong stops."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import head, tiny_tree
from make_tiny_base import make_tiny_base
from rich.console import Console
from safetensors.torch import load_file

from pipeline.disk.artifact import Artifact
from pipeline.errors import BrokenInvariant, UserError
from pipeline.models import adapters
from pipeline.recipe.recipe import Recipe, build
from pipeline.runs.runner import run
from pipeline.runs.stage import run_stage
from pipeline.runs.states import states
from pipeline.terminal.states import show_states


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
        assert manifest.data.counts["rows"] == rows
        assert manifest.invariants["base_unchanged"] is True
        assert manifest.invariants["trainable_dtype"] == "float32"
        assert manifest.after and not (out(chain, stage).folder / "checkpoints").exists()
    assert len({out(chain, stage).verify().base_digest for stage in chain[0]["stages"]}) == 1


def test_the_reference_of_dpo_is_the_sft_policy(chain: tuple[dict[str, Any], Path]) -> None:
    found = out(chain, "dpo").verify().invariants
    assert found["step_0_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert found["step_0_margin"] == 0
    assert list(out(chain, "dpo").snapshots()) == [2, 3, 4] and out(chain, "sft").snapshots() == {}  # of 6 steps
    files = {file.name for file in out(chain, "dpo").adapter.rglob("*") if file.is_file()}
    assert "adapter_model.safetensors" in files and not (out(chain, "dpo").adapter / "ref").exists()


def test_the_reward_model_is_the_sft_trunk_with_a_trained_head(chain: tuple[dict[str, Any], Path]) -> None:
    manifest = out(chain, "reward").verify()
    assert manifest.invariants["head_moved_by"] > 0
    assert manifest.invariants["reload_score_difference"] <= 1e-5
    saved = load_file(out(chain, "reward").adapter / adapters.WEIGHTS)
    assert any("score" in name for name in saved)
    assert json.loads((out(chain, "reward").adapter / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_each_stage_leaves_the_numbers_that_a_recipe_may_make_demands_of(chain: tuple[dict[str, Any], Path]) -> None:
    recipe = build(chain[0])
    for stage in recipe.order():
        after = out(chain, stage).verify().after
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


def test_other_held_out_files_are_measured_on_and_nothing_is_trained(
    chain: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """The numbers are those of the trained adapter, and of its parent's before, taken here by plain scoring."""
    from pipeline.data import render
    from pipeline.data.contracts import PREFERENCE
    from pipeline.data.load import DataSpec, read_source
    from pipeline.measure import scoring
    from pipeline.models import base as bases
    from pipeline.models.lora import fuse

    runs = tmp_path / "runs"
    shutil.copytree(chain[1], runs)
    others = {
        "questions": head("questions.jsonl", 3, tmp_path / "questions.jsonl"),
        "pairs": head("comparisons.jsonl", 7, tmp_path / "pairs.jsonl"),
    }
    changes = [f"stages.{name}.data.test={others['pairs']}" for name in ("reward", "dpo")]
    recipe = build(chain[0], [f"stages.sft.questions={others['questions']}", *changes])
    found = {state.name: (state.word, state.why) for state in states(recipe, runs)}
    assert found == {
        "pretrain": ("fresh", ""),
        "sft": ("unmeasured", "the file of questions has changed"),
        "reward": ("unmeasured", "the file of data.test has changed"),
        "dpo": ("unmeasured", "the file of data.test has changed"),
    }
    before = {name: recipe.artifact(name, runs).verify() for name in recipe.order()}
    show_states(states(recipe, runs), Console(file=(shown := io.StringIO()), width=120))
    assert re.search(r"sft +unmeasured, would be measured, not trained +the file of questions has", shown.getvalue())
    assert run(recipe, only=["sft"], runs=runs) == ["sft"]
    for name in ("reward", "dpo"):
        run_stage(recipe, name, runs)
    assert words(recipe, runs) == dict.fromkeys(recipe.order(), "fresh")
    after = {name: recipe.artifact(name, runs).verify() for name in recipe.order()}
    for name in recipe.order():
        same = ("files", "fingerprint", "parts", "parents", "invariants", "started", "seconds")
        assert [getattr(after[name], key) for key in same] == [getattr(before[name], key) for key in same]
        assert after[name].data.counts == before[name].data.counts
    assert after["sft"].data.questions == 3 and after["dpo"].data.held_out == 7
    assert len(recipe.artifact("sft", runs).samples.read_text().splitlines()) == 3

    spec = recipe.spec.model
    tokenizer = bases.load_tokenizer(spec)
    rows = read_source(others["pairs"], PREFERENCE, DataSpec(path=others["pairs"])).rows
    replies = [(render.reply(tokenizer, row, "chosen"), render.reply(tokenizer, row, "rejected")) for row in rows]
    for when, stage in (("before", "sft"), ("after", "dpo")):
        model = adapters.as_trained(bases.load_base(spec, tokenizer), recipe.artifact(stage, runs).adapter)
        fuse(model)
        plain = scoring.preferences(model, tokenizer, replies)
        assert {key: getattr(after["dpo"], when)[key] for key in plain} == pytest.approx(plain, abs=1e-6)
    talks = [[render.conversation(tokenizer, row, side) for side in ("chosen", "rejected")] for row in rows]
    base = bases.load_base(spec, tokenizer, num_labels=1)
    model = adapters.as_trained(base, recipe.artifact("reward", runs).adapter)
    fuse(model)
    plain = scoring.reward_model(model, tokenizer, talks)
    assert {key: after["reward"].after[key] for key in plain} == pytest.approx(plain, abs=1e-6)


def test_a_ppo_stage_is_measured_again_too(tiny_base: Path, tmp_path: Path) -> None:
    """Named back, the first file of held-out prompts gives the first numbers: the draws are the same."""
    (tmp_path / "pays.py").write_text(
        "def pays(completions, **_):\n    return [len(c[0]['content']) for c in completions]\n"
    )
    tree = tiny_tree(tiny_base, tmp_path)
    held_out = [head("prompts_test.jsonl", rows, tmp_path / f"{rows}.jsonl") for rows in (3, 2)]
    tree["train"] = {}
    tree["stages"] = {
        "ppo": {
            "data": {"path": head("prompts.jsonl", 8, tmp_path / "prompts.jsonl"), "test": held_out[0]},
            "reward": f"{tmp_path}/pays.py:pays",
            "train": {"steps": 2, "batch_size": 4, "response_length": 8, "kl_stop": 1000.0, "learning_rate": 1e-2},
        }
    }  # fmt: skip
    run_stage(build(tree), "ppo", tmp_path)
    found = [build(tree).artifact("ppo", tmp_path).verify()]
    for file in (held_out[1], held_out[0]):
        recipe = build(tree, [f"stages.ppo.data.test={file}"])
        assert words(recipe, tmp_path) == {"ppo": "unmeasured"}
        run_stage(recipe, "ppo", tmp_path)
        found.append(recipe.artifact("ppo", tmp_path).verify())
    assert [one.data.held_out for one in found] == [3, 2, 3]
    assert len({one.files[adapters.WEIGHTS] for one in found}) == 1
    assert found[0].after == found[2].after and found[0].before == found[2].before
    assert found[0].after["kl"] > 0 and found[1].after["reward"] != found[0].after["reward"]


def test_other_versions_are_said_and_noted(
    chain: tuple[dict[str, Any], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, runs = copied(chain, tmp_path)
    sft = recipe.artifact("sft", runs)
    sft.seal(sft.verify().model_copy(update={"versions": {**sft.verify().versions, "trl": "0.1"}}))
    (state,) = [state for state in states(recipe, runs) if state.name == "sft"]
    assert state.word == "fresh" and state.why.startswith("made with trl 0.1 (here ")
    run_stage(recipe, "dpo", runs)
    assert "warning: 'sft' was made with trl 0.1 (here " in capfd.readouterr().out
    assert recipe.artifact("dpo", runs).verify().versions_changed["'sft'"]["trl"][0] == "0.1"


def test_a_stage_that_computes_otherwise_is_stale(
    chain: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.stages import STAGES

    monkeypatch.setitem(STAGES, "dpo", replace(STAGES["dpo"], arithmetic=STAGES["dpo"].arithmetic + 1))
    found = {state.name: state for state in states(build(chain[0]), chain[1])}
    assert [name for name, state in found.items() if not state.fresh] == ["dpo"]
    assert found["dpo"].why == "this version of OneBase trains it in another way (1, now 2)"


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
    with pytest.raises(UserError, match="'dpo' continues 'sft', which is new"):
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
    sft.seal(sft.finished())
    assert words(recipe, runs) == {"pretrain": "fresh", "sft": "fresh", "reward": "stale", "dpo": "stale"}


def test_a_wrong_reference_stops_dpo_before_it_trains(
    chain: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: the reference copy is taken before the SFT adapter is there."""
    import torch

    from pipeline.training import trainer as shared

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


def test_a_base_of_other_bytes_names_both_devices_and_what_to_do(
    chain: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """As after a parent that a GPU has quantised in another way than this CPU does."""
    recipe, runs = copied(chain, tmp_path)
    sft = recipe.artifact("sft", runs)
    sft.seal(sft.verify().model_copy(update={"base_digest": "0" * 16, "device": "NVIDIA H100"}))
    with pytest.raises(BrokenInvariant) as caught:
        run_stage(recipe, "dpo", runs)
    for said in ("on NVIDIA H100", "on cpu", "one kind of device", "run 'sft' and what it goes on from here again"):
        assert said in str(caught.value)


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

"""A recipe's demands stop a run with the numbers, are checked when it is read, and are no part of any fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import seal, tiny_tree

from pipeline.errors import UserError
from pipeline.recipe import gates
from pipeline.recipe.recipe import Recipe, build
from pipeline.runs import runner


def finished(recipe: Recipe, stage: str, runs: Path, after: dict[str, float]) -> None:
    """A stage's folder as its worker leaves it."""
    artifact = recipe.artifact(stage, runs)
    artifact.adapter.mkdir(parents=True)
    (artifact.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    seal(recipe, stage, runs, after)


@pytest.fixture
def started(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Path, list[str]]:
    """A recipe whose pretrain has finished with a loss of 4.1; the stages that were launched after it."""
    tree, runs = tiny_tree(tiny_base, tmp_path), tmp_path / "runs"
    finished(build(tree), "pretrain", runs, {"loss": 4.1})
    launched: list[str] = []

    def launch(recipe: Recipe, stage: str, *rest: Any) -> None:
        launched.append(stage)
        finished(recipe, stage, runs, {"loss": 2.0, "question_accuracy": 0.55, "accuracy": 0.8})

    monkeypatch.setattr(runner, "_launch", launch)
    return tree, runs, launched


def test_a_run_stops_after_the_stage_that_misses_and_force_goes_on(
    started: tuple[dict[str, Any], Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    tree, runs, launched = started
    recipe = build({**tree, "expect": {"pretrain.loss": "< 4.2", "sft.question_accuracy": ">= 0.6"}})
    with pytest.raises(UserError, match=r"expect.sft.question_accuracy: wanted >= 0.6, found 0.55"):
        runner.run(recipe, runs=runs)
    assert launched == ["sft"]
    # The stage is fresh by now, and still not good enough.
    with pytest.raises(UserError, match="--force"):
        runner.run(recipe, runs=runs)
    assert launched == ["sft"]
    runner.run(recipe, runs=runs, force=True)
    assert launched == ["sft", "reward", "dpo"]
    assert "misses what is expected" in capsys.readouterr().out


def test_what_goes_on_from_a_stage_that_misses_stops_as_well(started: tuple[dict[str, Any], Path, list[str]]) -> None:
    tree, runs, launched = started
    recipe = build({**tree, "expect": {"pretrain.loss": "< 4"}})
    with pytest.raises(UserError, match=r"'pretrain' does not reach .*\n.*wanted < 4, found 4.1"):
        runner.run(recipe, only=["sft"], runs=runs)
    assert launched == []
    runner.run(recipe, only=["sft"], runs=runs, force=True)
    assert launched == ["sft"]


def test_a_number_that_the_stage_did_not_take_is_named(started: tuple[dict[str, Any], Path, list[str]]) -> None:
    tree, runs, _ = started
    recipe = build(tree, ["expect.pretrain.question_accuracy='>= 0.6'"])
    with pytest.raises(UserError, match=r"question_accuracy: the stage has no such number \(it has: loss\)"):
        runner.run(recipe, only=["pretrain"], runs=runs)


def test_demands_change_no_fingerprint(started: tuple[dict[str, Any], Path, list[str]]) -> None:
    tree, _, _ = started
    assert build(tree).parts() == build({**tree, "expect": {"sft.loss": "< 1"}}).parts()


@pytest.mark.parametrize(
    ("expect", "says"),
    [
        ({"stf.loss": "< 1"}, r"expect.stf.loss: name a stage and its number.*pretrain, sft"),
        ({"sft": "< 1"}, r"expect.sft: name a stage and its number"),
        ({"sft.loss": "about 1"}, r"expect.sft.loss: is 'about 1', expected a comparison"),
        ({"sft.loss": "< one"}, r"expected a comparison"),
        ({"sft.loss": 1}, r"expect.sft.loss: is 1, expected a comparison with a number in quotes"),
        ({"sft": {"loss": None}}, r"expect.sft.loss: is None, expected a comparison"),
        ({"sft.acuracy": "> 0"}, r"expect.sft.acuracy: sft does not give this number .*question_accuracy"),
        ({"reward.loss": "> 0"}, r"expect.reward.loss: reward does not give this number .*accuracy, margin"),
    ],
)
def test_demands_that_say_nothing_are_refused(
    started: tuple[dict[str, Any], Path, list[str]], expect: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        build({**started[0], "expect": expect})


def test_an_evaluation_holds_what_is_expected_of_what_is_kept(started: tuple[dict[str, Any], Path, list[str]]) -> None:
    """The run itself does not stop at such a demand: it is measured later."""
    tree, runs, launched = started
    key = "dpo.forgetting.sft.question_accuracy"
    demands = {key: ">= -0.05", "sft.forgetting.pretrain.corpus_loss_high": "< 0.1"}
    recipe = build({**tree, "expect": demands})
    runner.run(recipe, runs=runs)
    assert launched == ["sft", "reward", "dpo"]
    good, other = {key.partition(".")[2]: -0.04}, {"forgetting.pretrain.corpus_loss_high": 0.05}
    gates.hold_measured(recipe.spec.expect, {"dpo": good, "sft": other})
    with pytest.raises(UserError, match=rf"the evaluation does not reach .*\n.*{key}: wanted >= -0.05, found -0.06"):
        gates.hold_measured(recipe.spec.expect, {"dpo": {key.partition(".")[2]: -0.06}, "sft": other})
    gates.hold_measured(recipe.spec.expect, {"sft": other})  # dpo has not finished
    for wrong in ("sft.forgetting.dpo.question_accuracy", "dpo.forgetting.sft.corpus_loss"):
        with pytest.raises(UserError, match="does not give this number"):
            build({**tree, "expect": {wrong: "> 0"}})

"""Rounds: stages repeated on people's votes; a run waits for them, and what a test holds out stays out of training."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import seal, tiny_tree, write_recipe
from test_desk import label_all
from test_label import PLAIN, draw
from test_votes import vote
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.data.votes import append, pair_of, parse
from pipeline.errors import UserError
from pipeline.evaluate.stored import Results, RewardModel
from pipeline.label.opening import labels_of, open_desk
from pipeline.label.rounds import rounds
from pipeline.measure.metric import Estimate
from pipeline.recipe.recipe import Recipe, build, read
from pipeline.recipe.waiting import progress
from pipeline.runs.rows import load_rows
from pipeline.runs.runner import run
from pipeline.runs.stage import run_stage
from pipeline.runs.states import states


@pytest.fixture
def tree(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe in the folder where its commands are typed: one stage that is there already, and those of the rounds."""
    monkeypatch.chdir(tmp_path)
    whole = tiny_tree(tiny_base, tmp_path)
    prompts = [{"prompt": [{"role": "user", "content": f"What is {n}?"}]} for n in range(60)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    dialogues = [{**row, "completion": [{"role": "assistant", "content": "It is tin."}]} for row in prompts[:8]]
    (tmp_path / "dialogues.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dialogues), encoding="utf-8")
    whole["stages"] = {
        "sft": {"data": {"path": "dialogues.jsonl"}},
        "reward": {"from": "sft", "data": {"path": "labels/", "test": 0.2}},
        "dpo": {"from": "sft", "data": {"path": "./labels"}, "train": {"num_train_epochs": 1}},
        "ppo": {
            "from": "dpo", "reward": "reward", "data": {"path": "prompts.jsonl"},
            "train": {"steps": 1, "batch_size": 2, "response_length": 4},
        },
    }  # fmt: skip
    return {**whole, "rounds": {"count": 3, "votes": 4}}


def say_of(number: int, round_: int, name: str = "ada", **more: Any) -> None:
    """A vote in a round's file, as the page would append it."""
    prompt = [{"role": "user", "content": f"What is {number}?"}]
    row = vote(number, **{"annotator": name, "prompt": prompt, "edit": None, **more})
    row["pair"] = pair_of(prompt, [candidate["text"] for candidate in row["candidates"]])
    folder = Path(f"labels/round-{round_}")
    folder.mkdir(parents=True, exist_ok=True)
    append(folder / f"{name}.jsonl", parse(json.dumps(row), "here"))


def typed(*words: str) -> str:
    """What a command prints."""
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return done.output


def words(recipe: Recipe) -> dict[str, str]:
    return {state.name: state.word for state in states(recipe)}


def test_rounds_are_the_stages_spelt_out_by_hand(tree: dict[str, Any]) -> None:
    """The same fingerprints as a recipe that names every stage of every round itself."""
    tree["rounds"] = 2
    tree["stages"]["ppo"]["reward"] = [{"source": "reward", "weight": 2.0}]
    tree["stages"]["dpo"]["data"] = {"mix": [{"path": "labels/", "weight": 3}, {"path": "pairs.jsonl", "weight": 1}]}
    tree["stages"]["dpo"]["replay"] = {"sft": 0.1}
    tree["expect"] = {"reward.accuracy": ">= 0.5", "ppo": {"forgetting.dpo.question_accuracy": ">= -1"}}
    tree["stages"]["dpo"]["questions"] = "questions.jsonl"
    by_hand = copy.deepcopy(tree)
    stages = {"sft": tree["stages"]["sft"]}
    for n in (1, 2):
        labels = {"path": "labels/", "rounds": n}
        stages[f"reward-{n}"] = {"kind": "reward", "from": "sft", "data": {**labels, "test": 0.2}}
        stages[f"dpo-{n}"] = {
            "kind": "dpo", "from": "sft", "replay": {"sft": 0.1}, "questions": "questions.jsonl",
            "data": {"mix": [{**labels, "weight": 3}, {"path": "pairs.jsonl", "weight": 1}], "apart": 0.2},
            "train": {"num_train_epochs": 1},
        }  # fmt: skip
        stages[f"ppo-{n}"] = {
            "kind": "ppo", "from": f"dpo-{n}", "reward": [{"source": f"reward-{n}", "weight": 2.0}],
            "data": {"path": "prompts.jsonl", "apart": 0.2},
            "train": {"steps": 1, "batch_size": 2, "response_length": 4},
        }  # fmt: skip
    by_hand["stages"] = stages
    by_hand["expect"] = {}
    for n in (1, 2):
        by_hand["expect"][f"reward-{n}.accuracy"] = ">= 0.5"
        by_hand["expect"][f"ppo-{n}"] = {f"forgetting.dpo-{n}.question_accuracy": ">= -1"}
    for n in range(4):
        say_of(n, 1), say_of(n, 2)
    spelt, other = build(tree), build(by_hand)
    assert spelt.order() == ["sft", "reward-1", "dpo-1", "ppo-1", "reward-2", "dpo-2", "ppo-2"] == other.order()
    assert spelt.parts() == other.parts() and spelt.spec == other.spec
    # as the processes of a run read it; an override counts for all rounds
    assert build(spelt.tree).parts() == spelt.parts()
    assert build(tree, ["stages.dpo.train.beta=0.3"]).stages["dpo-2"].train["beta"] == 0.3


def test_what_is_wrong_is_named_as_it_was_written(tree: dict[str, Any], tmp_path: Path) -> None:
    def refused(**changed: Any) -> str:
        file = write_recipe({**copy.deepcopy(tree), **changed}, tmp_path / "my.yaml")
        with pytest.raises(UserError) as found:
            read(file).parts()
        return str(found.value)

    assert "rounds.count" in refused(rounds=0)
    stages = tree["stages"]
    assert "no stage learns from votes" in refused(stages={"sft": stages["sft"]})
    assert "the name 'dpo-2'" in refused(stages={**stages, "dpo-2": {"kind": "dpo", "data": {"path": "pairs.jsonl"}}})
    assert "stages.dpo.train.bta" in refused(stages={**stages, "dpo": {**stages["dpo"], "train": {"bta": 1}}})
    no_file = refused(stages={**stages, "ppo": {**stages["ppo"], "data": {"path": "none.jsonl"}}})
    line = next(n for n, text in enumerate((tmp_path / "my.yaml").read_text().splitlines(), 1) if "none.jsonl" in text)
    assert f"my.yaml:{line}: stages.ppo.data.path" in no_file
    counted = {"path": "labels/", "test": 3}
    of_reward = refused(stages={**stages, "reward": {"from": "sft", "data": counted}})
    assert "stages.reward.data.test: with rounds, test is a share" in of_reward
    spelt = {"kind": "dpo", "data": {"path": "labels/", "rounds": 1}}
    file = write_recipe({**tree, "stages": {"dpo": spelt}}, tmp_path / "my.yaml")
    written = json.loads(file.read_text())
    del written["rounds"]
    with pytest.raises(UserError, match="goes with rounds"):
        read(write_recipe(written, file))


def test_a_run_waits_for_people_and_goes_on(tree: dict[str, Any], tmp_path: Path) -> None:
    """No vote, some, enough; then the next round waits, and what was trained stays as it is."""
    del tree["stages"]["ppo"], tree["stages"]["reward"]
    del tree["stages"]["dpo"]["from"], tree["stages"]["sft"]
    recipe = read(write_recipe(tree, tmp_path / "my.yaml"))
    assert set(words(recipe).values()) == {"waiting"} and run(recipe) == []
    say_of(0, 1), say_of(1, 1, choice="tie"), say_of(2, 1, choice="skip"), say_of(3, 1, gold=0)
    say_of(4, 1), say_of(5, 1, name="bob")
    say_of(5, 1, name="bob", id="back", undoes="v5")
    first = states(recipe)[0]
    assert first.why == "round 1 of 3: 2 of 4 labels"  # neither ties, skips, known answers nor what was taken back
    for command in ("check", "data", "plan", "status"):
        assert "round 1 of 3: 2 of 4 labels" in typed(command, "my.yaml")
    old = Path("labels/old.jsonl")
    old.write_bytes(Path("labels/round-1/bob.jsonl").read_bytes())  # of before there were rounds
    assert "The votes in labels are of no round" in typed("status", "my.yaml")
    old.unlink()
    assert "of no round" not in typed("status", "my.yaml")
    assert json.loads(typed("status", "my.yaml", "--json"))["rounds"][0] == {"labels": 2, "votes": 4, "full": False}
    for n in (6, 7):
        say_of(n, 1)
    assert words(recipe) == {"dpo-1": "new", "dpo-2": "waiting", "dpo-3": "waiting"}
    run_stage(recipe, "dpo-1", Path("runs"))
    assert recipe.artifact("dpo-1").finished().data.counts["rows"] == 4
    told = typed("run", "my.yaml")
    assert "dpo-2: waiting" in told and "round 2 of 3: 0 of 4 labels. To label: onebase label my.yaml" in told
    for n in range(10, 14):
        say_of(n, 2)
    assert words(recipe) == {"dpo-1": "fresh", "dpo-2": "new", "dpo-3": "waiting"}
    assert len(load_rows(recipe, "dpo-2")[0].train) == 8  # of both rounds
    say_of(20, 1)
    assert words(recipe) == {"dpo-1": "stale", "dpo-2": "new", "dpo-3": "waiting"}


def test_what_a_test_holds_out_enters_no_training_of_any_round(tree: dict[str, Any]) -> None:
    """Though each round has more prompts, stages learn other kinds of rows, and one samples from prompts."""
    del tree["train"]["train_sampling_strategy"]
    tree["stages"]["kto"] = {"from": "sft", "data": {"path": "labels/", "test": 0.1}}
    tree["stages"]["more"] = {"kind": "sft", "from": "sft", "data": {"path": "labels/"}}
    for n in range(60):
        right = {"edit": {"candidate": 0, "text": "It is wool."}} if n % 2 else {}
        say_of(n, 1 + n // 20, **right)
    recipe = build(tree)

    def asked(rows: Any) -> set[str]:
        return {row["prompt"][0]["content"] for row in rows}

    trained: set[str] = set()
    held_out: dict[str, set[str]] = {}
    for name in (name for name in recipe.order() if recipe.round_of(name)):
        rows, sources = load_rows(recipe, name)
        trained |= asked(rows.train)
        held_out[name] = asked(rows.test or ())
        counts = sources[0].counts()
        assert counts.used + counts.held_out + counts.left_out == counts.rows and counts.used == len(rows.train)
    assert held_out["reward-1"] < held_out["reward-2"] < held_out["reward-3"]
    assert 5 <= len(held_out["reward-3"]) <= 20 and held_out["kto-3"] < held_out["reward-3"]
    assert not trained & held_out["reward-3"]
    assert len(trained) == 60 - len(held_out["reward-3"])


def test_people_read_the_answers_of_the_round_before(tree: dict[str, Any], tmp_path: Path) -> None:
    """Until a round has its votes; a prompt comes to nobody twice, whatever round it was in."""
    rows = (tmp_path / "dialogues.jsonl").read_text().splitlines()[:7]
    (tmp_path / "dialogues.jsonl").write_text("\n".join(rows))
    asked = {"prompt": json.loads(rows[0])["prompt"], "answer": "tin"}
    (tmp_path / "asked.jsonl").write_text(json.dumps(asked))
    tree["stages"]["dpo"]["questions"] = "asked.jsonl"  # a test of a stage that still waits is a test all the same
    del tree["stages"]["ppo"], tree["stages"]["reward"]
    recipe = read(write_recipe({**tree, "rounds": {"count": 2, "votes": 4}}, tmp_path / "my.yaml"))
    train(recipe, "sft")
    seen = {}
    for number, stage in ((1, "sft"), (2, "dpo-1")):
        if number == 2:
            with pytest.raises(UserError, match=r"round 2 are those of 'dpo-1', which is new .* onebase run"):
                open_desk(recipe, PLAIN, Path("runs"))
            train(recipe, "dpo-1")
        draw(recipe, tmp_path)
        desk = open_desk(recipe, PLAIN, Path("runs"))
        assert {policy.stage for policy in desk.drawer.policies} == {stage}
        assert desk.folder == Path(f"labels/round-{number}")
        seen[number] = {name: {pair.asks for pair in pairs} for name, pairs in label_all(desk, "ada", "bob").items()}
        assert desk.full and desk.progress("ada")["round"] == f"round {number} of 2: 4 of 4 labels"
        assert asked["prompt"] not in [pair.prompt for pair in desk.drawer.pairs] and len(desk.drawer.pairs) == 6
    first, second = seen[1], seen[2]
    assert not first["ada"] & second["ada"] and not first["bob"] & second["bob"]
    new = (second["ada"] | second["bob"]) - first["ada"] - first["bob"]
    assert len(new) == 2  # of six prompts four were labelled before: those come last, to the other person
    with pytest.raises(UserError, match="every round of .* has its labels"):
        labels_of(recipe)


def test_the_report_has_a_row_for_each_round(tree: dict[str, Any], tmp_path: Path) -> None:
    """Labels spent and agreement from the votes; numbers of the policy and the reward model of that round."""
    tree["stages"] = {name: tree["stages"][name] for name in ("sft", "reward", "dpo")}
    recipe = read(write_recipe(tree, tmp_path / "my.yaml"))
    for n in range(4):  # in the first round two people say the same, in the second the opposite
        for round_, choice in ((1, n % 2), (2, 1 - n % 2)):
            say_of(n, round_, choice=n % 2, edit=None)
            say_of(n, round_, name="bob", choice=choice)
    for stage in ("sft", "reward-1", "dpo-1"):
        train(recipe, stage)

    def sure(value: float) -> Estimate:
        return Estimate(value, value - 0.1, value + 0.1, 9, "")

    numbers = {"base": {}, "sft": {"reward": sure(0.2)}, "dpo-1": {"reward": sure(0.7), "kl": sure(3.0)}}
    ranked = RewardModel.model_construct(accuracy=sure(0.9))
    before, first, second = rounds(recipe, Results.model_construct(numbers=numbers, reward_models={"reward-1": ranked}))
    assert (before.stage, before.labels, before.numbers) == ("sft", 0, {"reward": sure(0.2)})
    assert (first.stage, first.labels, first.so_far) == ("dpo-1", 8, 8)
    assert first.numbers["agreement"].value == 1 and second.numbers["agreement"].value < 0
    assert first.numbers["reward"] == sure(0.7) and first.numbers["accuracy"] == sure(0.9) and len(first.numbers) == 3
    assert (second.stage, second.labels, second.so_far) == ("", 8, 16)
    typed("report", "my.yaml")
    page = Path("runs/tiny/report/report.html").read_text(encoding="utf-8")
    table = page.partition('<section id="rounds">')[2].partition("</table>")[0]
    assert re.findall(r"<th>(.*?)</th>", table) == ["round", "0: sft", "1", "2"]  # what is not evaluated has no stage
    assert re.findall(r"<td.*?>(\w+)</td>", table)[:4] == ["labels", "0", "8", "8"]


def train(recipe: Recipe, stage: str) -> None:
    """As if a run had made it."""
    adapter = recipe.artifact(stage).adapter
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(stage.encode())
    seal(recipe, stage, Path("runs"), {})


def test_a_round_waits_for_people_and_an_arena_for_nobody(tree: dict[str, Any], tmp_path: Path) -> None:
    """A judge's votes are no labels of a round. What tests hold out is shown in the arena whatever waits."""
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": "What is best?", "answer": "tin"}))
    tree["stages"]["sft"]["questions"] = "asked.jsonl"
    recipe = read(write_recipe(tree, tmp_path / "my.yaml"))
    train(recipe, "sft")
    for number in range(4):
        say_of(number, 1, "judge.m", judge=True)
    say_of(9, 1)
    assert progress(recipe, 1).labels == 1
    desk = open_desk(recipe, replace(PLAIN, stages=["base", "sft"], arena=True), Path("runs"))
    assert [row["prompt"] for row in desk.drawer.prompts] == ["What is best?"] and desk.folder == tmp_path / "arena"

"""Classification: the loss and the numbers against independent references, the stage from rows to what is published,
and what bad rows get."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import ROOT, onebase, tiny_tree, typed, write_recipe
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support
from torch.nn import functional

from pipeline.data.examine import faults_in
from pipeline.errors import UserError
from pipeline.measure import classes
from pipeline.recipe.recipe import read
from pipeline.runs.rows import load_rows
from pipeline.stages.classify import ClassifySpec, mean_loss, weigh_classes
from pipeline.terminal.data import examine


class Scored:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts in which one word tells the class."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        label = ("warm", "cold", "wet")[number % 3]
        words = [draw.choice(["day", "wind", "hill", "road", "house"]) for _ in range(draw.randint(2, 6))]
        words.insert(draw.randrange(len(words)), {"warm": "sun", "cold": "ice", "wet": "rain"}[label])
        made.append({"text": f"{number} " + " ".join(words), "label": label})
    return made


def write(folder: Path, some: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return str(folder / name)


def recipe_of(tiny_base: Path, folder: Path, path: str, **section: Any) -> str:
    tree = tiny_tree(tiny_base, folder)
    train = {"learning_rate": 0.01, "max_steps": 40, "per_device_train_batch_size": 8, "max_length": 64}
    train |= section.pop("train", {})
    data = {"path": path, "test": 0.3} | section.pop("data", {})
    tree["stages"] = {"classify": {"data": data, "train": train, **section}}
    tree["train"], tree["expect"] = {}, section.pop("expect", {})
    return str(write_recipe(tree, folder / "recipe.yaml"))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, "balanced", {"a": 3.0, "b": 1.0, "c": 0.5}])
def test_the_loss_is_torchs_own(weights: Any, smoothing: float) -> None:
    torch.manual_seed(0)
    scores, place = torch.randn(6, 3), torch.tensor([0, 1, 2, 1, 0, 0])
    each = weigh_classes(weights, ["a", "b", "c"], Counter(a=3, b=2, c=1))
    if weights == "balanced":
        assert each == pytest.approx([6 / 9, 6 / 6, 6 / 3])
    one_hot = functional.one_hot(place, 3).float()
    ours = mean_loss(Scored(scores), one_hot, torch.tensor(18), torch.tensor(each), smoothing, several=False)
    if not smoothing:  # with class weights torch's own mean divides by their sum, so compare the sums
        theirs = functional.cross_entropy(scores, place, torch.tensor(each), reduction="sum") / 6
    else:
        soft = one_hot * (1 - smoothing) + smoothing / 3
        theirs = -(soft * torch.tensor(each) * scores.log_softmax(1)).sum() / 6
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    # A step's mean over two parts is the sum of what each part gives.
    halves = [
        mean_loss(Scored(scores[part]), one_hot[part], 18, torch.tensor(each), smoothing, several=False)
        for part in (slice(0, 2), slice(2, 6))
    ]
    assert sum(halves).item() == pytest.approx(ours.item(), abs=1e-6)


def test_several_labels_are_each_a_question_of_their_own() -> None:
    torch.manual_seed(1)
    scores, labels = torch.randn(5, 4), (torch.rand(5, 4) > 0.5).float()
    ours = mean_loss(Scored(scores), labels, 20, torch.ones(4), 0.0, several=True)
    by_hand = [
        -(y * torch.sigmoid(x).log() + (1 - y) * (1 - torch.sigmoid(x)).log())
        for x, y in zip(scores.ravel(), labels.ravel(), strict=True)
    ]
    assert ours.item() == pytest.approx(sum(by_hand).item() / 20, abs=1e-6)


@pytest.mark.parametrize("several", [False, True])
def test_numbers_equal_scikit_learns(several: bool) -> None:
    draw = numpy.random.default_rng(3)
    scores = draw.normal(size=(200, 4))
    truth = (draw.random((200, 4)) > 0.6).astype(int) if several else numpy.eye(4, dtype=int)[draw.integers(0, 4, 200)]
    told = classes.choose(scores, several)
    before, after = classes.compare(truth, told, {}, None)
    assert before == {}
    assert after["macro_f1"] == pytest.approx(f1_score(truth, told, average="macro", zero_division=0.0))
    assert after["accuracy"] == pytest.approx(accuracy_score(truth, told))
    assert after["macro_f1_low"] < after["macro_f1"] < after["macro_f1_high"]
    first = classes.tell(truth, scores, list("abcd"), several, after)[0]
    precision, recall, f1, count = precision_recall_fscore_support(truth, told, zero_division=0.0)
    for place, row in enumerate(first.rows):
        shown = (f"{100 * precision[place]:.0f} %", f"{100 * recall[place]:.0f} %", f"{f1[place]:.2f}")
        assert row == ["abcd"[place], *shown, str(count[place])]


def test_from_rows_to_the_report(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(tiny_base, tmp_path, write(tmp_path, rows(60)), class_weights="balanced")
    assert "sound, 1 stage: classify" in typed("check", recipe)
    assert "classify (classify)" in typed("data", recipe)
    assert "classify" in typed("plan", recipe, "--gpu", "rtx3060")
    onebase(ROOT, tmp_path, "run", recipe)
    manifest = json.loads((tmp_path / "runs" / "tiny" / "classify" / "manifest.json").read_text())
    assert manifest["labels"] == ["cold", "warm", "wet"]
    assert manifest["after"]["macro_f1"] > 0.9 and manifest["before"]["macro_f1"] < 0.9
    assert manifest["after"]["bag_of_words"] > 0.9
    assert "macro F1" in typed("status", recipe)
    onebase(ROOT, tmp_path, "eval", recipe)
    typed("report", recipe)
    page = (tmp_path / "runs" / "tiny" / "report" / "report.md").read_text(encoding="utf-8")
    for shown in ("each class", "which class is taken for which", "is its confidence earned", "Better than before"):
        assert shown in page


SOME = rows(30)


@pytest.mark.parametrize(
    ("changed", "section", "says"),
    [
        ([{**row, "label": "warm"} for row in SOME], {}, "every row has the label 'warm'; two are needed"),
        ([{"text": " ", "label": "warm"}, *SOME], {}, "rows.jsonl:1: field 'text' is empty"),
        ([{"text": "sun"}, *SOME], {}, "rows.jsonl:1: has no field 'label'"),
        (
            [{"text": "sun", "label": None}, *SOME],
            {},
            "field 'label' is None, expected a text, a whole number",
        ),
        (SOME, {"labels": ["warm", "cold", "wet", "dry"]}, "no training row has the label 'dry'"),
        (SOME, {"labels": ["warm", "cold"]}, "the label 'wet' is not among those learnt (warm, cold)"),
        ([{**row, "label": 7} for row in SOME], {"labels": ["warm", "cold"]}, "there is no label number 7 of `labels`"),
        (SOME, {"class_weights": {"warm": 1.0}}, "class_weights: give exactly these labels a weight: cold, warm, wet"),
        ([*SOME, {"text": "sun", "label": []}], {}, "rows.jsonl:31: has 0 labels, and every training row has one"),
    ],
)
def test_bad_rows_are_named_before_training(
    tiny_base: Path, tmp_path: Path, changed: list[dict[str, Any]], section: dict[str, Any], says: str
) -> None:
    recipe = read(Path(recipe_of(tiny_base, tmp_path, write(tmp_path, changed), **section)))
    with pytest.raises(UserError, match=re.escape(says)):
        load_rows(recipe, "classify")
    assert any(says in fault for fault in faults_in(examine(recipe, ["classify"])))


def test_a_label_never_seen_in_training_is_named(tiny_base: Path, tmp_path: Path) -> None:
    test = write(tmp_path, [*rows(6, seed=1), {"text": "a storm", "label": "windy"}], "test.jsonl")
    recipe = read(Path(recipe_of(tiny_base, tmp_path, write(tmp_path, SOME), data={"test": test})))
    with pytest.raises(UserError, match=r"test.jsonl:7: the label 'windy' is not among those learnt"):
        load_rows(recipe, "classify")


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"labels": ["one"]}, "stages.classify.labels"),
        ({"labels": ["one", "two", "one"]}, "names 'one' twice"),
        ({"class_weights": {"one": float("inf"), "two": 1.0}}, "stages.classify.class_weights"),
        ({"class_weights": {"one": -1.0, "two": 1.0}}, "greater than 0"),
        ({"train": {"label_smoothing_factor": 1.5}}, "must be from 0 to below 1"),
        ({"class_weights": "even"}, "stages.classify.class_weights"),
        ({"instruction": "Say it"}, "must contain {text} and {labels}"),
        ({"train": {"center_rewards_coefficient": 0.1}}, "is for pairs"),
        ({"data": {"too_long": "keep_end"}}, "is for dialogues"),
    ],
)
def test_a_wrong_section_is_named(tiny_base: Path, tmp_path: Path, section: dict[str, Any], says: str) -> None:
    path = recipe_of(tiny_base, tmp_path, write(tmp_path, SOME), **section)
    with pytest.raises(UserError, match=re.escape(says)):
        read(Path(path))


def test_a_classifier_is_no_policy_and_no_reward_model(tiny_base: Path, tmp_path: Path) -> None:
    path = Path(recipe_of(tiny_base, tmp_path, write(tmp_path, SOME)))
    tree = json.loads(path.read_text())
    data = tiny_tree(tiny_base, tmp_path)["stages"]["sft"]["data"]
    with pytest.raises(UserError, match="'classify' leaves a classifier, not a policy"):
        read(write_recipe({**tree, "stages": {**tree["stages"], "sft": {"from": "classify", "data": data}}}, path))
    ppo = {"reward": "classify", "data": data, "train": {"steps": 1}}
    with pytest.raises(UserError, match="'classify' is a classify stage, not a reward model"):
        read(write_recipe({**tree, "stages": {**tree["stages"], "ppo": ppo}}, path))


def test_labels_are_read_as_they_are_meant() -> None:
    """A number in a CSV file is text; numbers are sorted as numbers; a label that stands twice counts once."""
    data = {"path": "rows.csv"}
    named = ClassifySpec.model_validate({"data": data, "labels": ["low", "high"]})
    assert [named.labels_of({"label": given}) for given in (0, "1", "high", ["1", 1])] == [
        ["low"], ["high"], ["high"], ["high"],
    ]  # fmt: skip
    plain = ClassifySpec.model_validate({"data": data})
    plain.check_rows([{"label": ["a", "b"]}, {"label": []}], None)  # where texts have several labels, one may have none
    assert plain.classes([{"label": number} for number in (10, 2, 1)])[0] == ["1", "2", "10"]


def test_a_classifier_is_judged_by_a_simpler_rule_where_nothing_came_before() -> None:
    from pipeline.evaluate.stored import Link
    from pipeline.evaluate.verdicts import _of_its_headline
    from pipeline.stages import STAGES

    numbers = {"macro_f1": 0.6, "over_bag_of_words": 0.1, "over_bag_of_words_low": 0.02, "over_bag_of_words_high": 0.2}
    for shift, word in ((0.0, "better"), (-0.1, "unclear"), (-0.3, "worse")):
        after = {key: value + shift * key.startswith("over") for key, value in numbers.items()}
        found = _of_its_headline(
            Link(name="c", kind="classify", parent=None, answers=False, after=after), STAGES["classify"]
        )
        assert found.word == word and found.text.startswith("Macro F1 0.60; macro F1 over a bag of words")

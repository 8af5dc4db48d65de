"""The arena of people: anonymous stages on held-out prompts, ratings that equal an independent algorithm's."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import write_recipe
from test_desk import given, label_all
from test_label import draw, make_recipe, train
from test_votes import vote

from pipeline.data.contracts import PREFERENCE
from pipeline.data.load import DataSpec, read_source
from pipeline.data.votes import Vote, pair_of
from pipeline.errors import UserError
from pipeline.evaluate import people
from pipeline.label.drawing import Drawer, Policy
from pipeline.label.opening import Wishes, open_desk
from pipeline.models import adapters
from pipeline.models import base as bases
from pipeline.models.spec import ModelSpec
from pipeline.recipe.recipe import Recipe, read

NOW = {"base": "", "pretrain": "q" * 64, "sft": "s" * 64, "dpo": "d" * 64, "ppo": "p" * 64}
ARENA = Wishes(["base", "sft"], [1.0], 2, 256, "random", 0.0, "", "", arena=True)


def line(number: int, one: str, other: str, choice: Any, who: str = "ada", **more: Any) -> dict[str, Any]:
    texts = [f"{one} says {number}.", f"{other} says {number}."]
    answers = [
        {"text": text, "stage": stage, "adapter": NOW[stage], "seed": 1, "temperature": 1.0}
        for text, stage in zip(texts, (one, other), strict=True)
    ]
    row = vote(number, id=f"{who}{number}{one}{other}", annotator=who, choice=choice, candidates=answers, edit=None)
    row |= {"guidelines": None, **more}
    return {**row, "pair": pair_of(row["prompt"], [answer["text"] for answer in row["candidates"]])}


def read_lines(lines: Sequence[dict[str, Any]], folder: Path) -> list[Vote]:
    folder.mkdir(exist_ok=True)
    (folder / "ada.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return people.read_arena(folder)[0]


def minorise(wins: dict[tuple[str, str], float], names: Sequence[str]) -> dict[str, float]:
    """Bradley-Terry by MM (Hunter 2004, "MM algorithms for generalized Bradley-Terry models", equation 3),
    stage by stage, with one tie for every two stages as a prior."""
    won = {(a, b): wins.get((a, b), 0.0) + 0.5 for a in names for b in names if a != b}
    strength = dict.fromkeys(names, 1.0)
    for _ in range(5000):
        for a in names:
            total = sum(won[a, b] for b in names if b != a)
            strength[a] = total / sum((won[a, b] + won[b, a]) / (strength[a] + strength[b]) for b in names if b != a)
    return {name: 400 * math.log10(value) for name, value in strength.items()}


def test_ratings_equal_hunters_algorithm(tmp_path: Path) -> None:
    """Equally good and both bad are half a point each; skips, known answers and earlier adapters count for nothing."""
    draw = numpy.random.default_rng(3)
    pairs = [("base", "sft"), ("sft", "dpo"), ("base", "dpo")]
    rows = [
        line(n, *pairs[n % 3], ["tie", "both_bad", 0, 1, 1][draw.integers(5)], who)
        for n in range(60)
        for who in ("ada", "bo")[: 1 + (n % 4 == 0)]
    ]
    wins: Counter[tuple[str, str]] = Counter()
    for row in rows:
        one, other = (answer["stage"] for answer in row["candidates"])
        half = isinstance(row["choice"], str)
        wins[one, other] += 0.5 if half else row["choice"] == 0
        wins[other, one] += 0.5 if half else row["choice"] == 1
    old = line(90, "sft", "dpo", 0)
    old["candidates"][0]["adapter"] = "e" * 64
    aside = [line(91, "base", "dpo", "skip"), line(92, "base", "dpo", 0, gold=0)]
    voters, found = people.rate(read_lines([*rows, old, *aside], tmp_path), NOW)
    assert found and voters.earlier == 1 and voters.people == 2
    assert sum(voters.votes.values()) == 2 * len(rows) and "ppo" not in found.names
    expected = minorise(wins, ("base", "sft", "dpo"))
    for a, b in pairs:
        assert found.elo[a].value - found.elo[b].value == pytest.approx(expected[a] - expected[b], abs=0.01)
    assert voters.agreement and voters.agreement.n == 15


def test_two_votes_on_one_prompt_are_not_two_prompts(tmp_path: Path) -> None:
    """Who repeats what another said makes nothing surer, which twice as many prompts would, by the root of two."""
    choices = [0, 1, 1] * 20

    def width(lines: list[dict[str, Any]]) -> float:
        found = people.rate(read_lines(lines, tmp_path), NOW)[1]
        assert found and (high := found.elo["dpo"].high) and (low := found.elo["dpo"].low)
        return high - low

    once = [line(n, "sft", "dpo", choice) for n, choice in enumerate(choices)]
    again = [line(n, "sft", "dpo", choice, "bo") for n, choice in enumerate(choices)]
    assert width(once + again) == pytest.approx(width(once), rel=0.1)


def test_what_cannot_be_rated_has_win_rates_alone(tmp_path: Path) -> None:
    """Few prompts, or stages that never met; and a line that is of no arena is named."""
    few = people.rate(read_lines([line(n, "sft", "dpo", 1) for n in range(5)], tmp_path), NOW)[1]
    assert few and not few.elo and few.wins["dpo"]["sft"].value == 1
    apart = [line(n, *(("base", "ppo") if n % 2 else ("sft", "dpo")), 1) for n in range(40)]
    found = people.rate(read_lines(apart, tmp_path), NOW)[1]
    assert found and not found.elo and found.wins["ppo"].keys() == {"base"}
    with pytest.raises(UserError, match=r"vote v0 of ada is not between two stages"):
        read_lines([vote(0)], tmp_path)


def arena_recipe(base: Path, folder: Path) -> Recipe:
    test = [{"prompt": f"What is made on isle {n}?", "completion": "Tin."} for n in (3, 5, 7)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test), encoding="utf-8")
    make_recipe(base, folder)
    data = {"path": str(folder / "rows.jsonl"), "test": str(folder / "test.jsonl")}
    return make_recipe(base, folder, stages={"sft": {"data": data}})


def test_stages_meet_on_what_tests_hold_out_and_training_never_reads_it(tiny_base: Path, tmp_path: Path) -> None:
    recipe = arena_recipe(tiny_base, tmp_path)
    draw(recipe, tmp_path, ARENA)
    desk = open_desk(recipe, ARENA, tmp_path / "runs")
    assert {pair.prompt for pair in desk.drawer.pairs} == {f"What is made on isle {n}?" for n in (3, 5, 7)}
    assert desk.folder == people.arena_of(recipe) and not desk.drawer.reward
    # After the stage is trained again its new answers to the same few prompts come to the same people.
    assert len(label_all(desk, "ada")["ada"]) == 3 and desk.next("ada") is None
    train(recipe, tmp_path, b"second")
    draw(recipe, tmp_path, ARENA, first="Wool")
    desk = open_desk(recipe, ARENA, tmp_path / "runs")
    assert len(label_all(desk, "ada")["ada"]) == 3 and desk.next("ada") is None
    # A stage that trains on the votes beside them reads none of these, and is not due again because of them.
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "ada.jsonl").write_text(json.dumps(vote(0)) + "\n", encoding="utf-8")
    tree = {**recipe.tree, "stages": {"reward": {"data": {"path": str(labels)}}}}
    reads = read(write_recipe(tree, tmp_path / "tiny.yaml"))
    before = reads.parts()
    desk.vote("bo", given(desk.drawer.pairs[0], 0))
    assert reads.parts() == before and people.arena_of(reads) == desk.folder
    rows = read_source(str(labels), PREFERENCE, DataSpec(path=str(labels))).rows
    assert {row["prompt"] for row in rows} == {"What is 0?"}
    for path in (desk.folder, desk.folder / "bo.jsonl"):
        tree["stages"] = {"reward": {"data": {"path": str(path)}}}
        with pytest.raises(UserError, match=r"stages.reward.data.path: .* holds votes on held-out prompts"):
            read(write_recipe(tree, tmp_path / "tiny.yaml")).parts()
    tree["stages"] = {"reward": {"data": {"path": str(labels), "test": str(desk.folder)}}}
    read(write_recipe(tree, tmp_path / "tiny.yaml")).parts()  # to be measured on is what they are for


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": ["sft"]}, "name two or more"),
        ({"stages": ["sft", "sft"]}, "name two or more"),
        ({"answers": 3}, "--answers does not go with --arena"),
        ({"choose": "gap"}, "--choose does not go with --arena"),
        ({"temperatures": [0.5, 1.0]}, "--temperature twice does not go with --arena"),
        ({}, "no test of the recipe holds out a prompt"),
    ],
)
def test_what_is_no_arena_is_refused(tiny_base: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    recipe = make_recipe(tiny_base, tmp_path)
    with pytest.raises(UserError, match=said):
        open_desk(recipe, replace(ARENA, **change), tmp_path / "runs")


def test_every_two_stages_meet_equally_often(tiny_base: Path, tmp_path: Path) -> None:
    """Three stages of one real base on twelve prompts: four times each two, an answer of each."""
    from pipeline.evaluate.bench import Bench

    spec = ModelSpec(base=str(tiny_base), dtype="bfloat16", lora={"r": 4, "target_modules": "all-linear"})
    tokenizer = bases.load_tokenizer(spec)
    for seed, name in enumerate(("sft", "dpo")):
        torch.manual_seed(seed)
        model = adapters.fresh(bases.load_base(spec, tokenizer), spec.lora)
        with torch.no_grad():
            for weight in adapters.trainable(model).values():
                weight.copy_(torch.randn_like(weight) * 0.1)
        (tmp_path / name).mkdir()
        adapters.save(model, tmp_path / name)
    bench = Bench(spec, {name: tmp_path / name for name in ("sft", "dpo")}, {}, 1.0)
    prompts = [{"prompt": [{"role": "user", "content": f"Isle {n}?"}]} for n in range(12)]
    policies = [Policy("base", "", 1.0), Policy("sft", "a", 1.0), Policy("dpo", "b", 1.0)]
    drawer = Drawer(tmp_path / "drawn", policies, prompts, 7, 6, "random", lambda: bench, arena=True)
    drawer._draw()
    met = Counter(tuple(answer.stage for answer in pair.candidates) for pair in drawer.pairs)
    assert met == {("base", "sft"): 4, ("base", "dpo"): 4, ("sft", "dpo"): 4}
    assert [pair.prompt for pair in drawer.pairs] == [row["prompt"] for row in prompts]

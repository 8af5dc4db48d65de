"""A judge votes first: every vote on disk at once, people check a part blind, and a judge they do not agree with is
not trained on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import seal
from test_agreement import by_the_definition
from test_agreement import line as said
from test_desk import label_all
from test_judge import url  # noqa: F401
from test_label import PLAIN, draw, make_recipe
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.data.contracts import DEMONSTRATION, PREFERENCE
from pipeline.data.load import DataSpec, Source, read_source
from pipeline.data.votes import parse, read_votes
from pipeline.errors import UserError
from pipeline.evaluate.judge import Judge
from pipeline.label.agreement import tell, weigh
from pipeline.label.judging import annotator_of, judge_pairs
from pipeline.label.opening import open_desk
from pipeline.recipe.recipe import Recipe, read


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path) -> Recipe:
    found = make_recipe(tiny_base, tmp_path)
    draw(found, tmp_path)  # "Cheese 3." beside "Kites 3."
    return found


def test_an_endpoint_votes_and_goes_on_where_it_was_stopped(
    recipe: Recipe,
    tmp_path: Path,
    url: str,  # noqa: F811
) -> None:
    file = tmp_path / "labels" / "judge.Acme-longer-7b.jsonl"
    assert annotator_of(Judge(url, "Acme/longer-7b")) == file.stem and annotator_of("reward") == "judge.reward"

    def go_on(model: str, labels: int) -> list[Any]:
        judge_pairs(open_desk(recipe, PLAIN, tmp_path / "runs"), Judge(url, model), labels, 0.5)
        return read_votes(tmp_path / "labels" / f"judge.{model}.jsonl")[0]

    first = go_on("longer", 5)
    votes = go_on("longer", 40)
    assert len(first) == 5 and votes[:5] == first and len({vote.pair for vote in votes}) == len(votes) == 40
    for vote in votes:
        lengths = [len(candidate.text) for candidate in vote.candidates]
        assert vote.judge and vote.annotator == "judge.longer" and vote.choice == lengths.index(max(lengths))
    # of 40 that are checked with probability 0.5, within four deviations
    assert abs(sum(vote.share for vote in votes) - 20) < 4 * math.sqrt(10)
    assert {vote.choice for vote in go_on("first", 6)} == {"tie"}  # a verdict that changes with the order
    with pytest.raises(UserError, match=r"judge\.chatty is rejected: 8 of its 8 replies are not A, B or tie"):
        go_on("chatty", 6)
    with pytest.raises(UserError, match="there is no model of this name"):
        go_on("unknown", 6)
    assert not (tmp_path / "labels" / "judge.chatty.jsonl").exists()


def test_people_see_the_sample_first_and_nothing_else_that_was_judged(
    recipe: Recipe,
    tmp_path: Path,
    url: str,  # noqa: F811
) -> None:
    judge_pairs(open_desk(recipe, PLAIN, tmp_path / "runs"), Judge(url, "longer"), 20, 0.4)
    votes = read_votes(tmp_path / "labels")[0]
    sample, judged = {vote.pair for vote in votes if vote.share}, {vote.pair for vote in votes}
    desk = open_desk(recipe, PLAIN, tmp_path / "runs")
    seen = [pair.name for pair in label_all(desk, "ada")["ada"]]
    assert 0 < len(sample) < 20 and set(seen[: len(sample)]) == sample
    assert len(seen) == len(sample) + 20 and not set(seen[len(sample) :]) & judged
    # One person was enough for each; and their votes are theirs alone.
    assert open_desk(recipe, PLAIN, tmp_path / "runs").next("bo") is None
    assert not any(vote.judge for vote in read_votes(tmp_path / "labels" / "ada.jsonl")[0])


def test_a_reward_stage_votes_by_its_scores(tiny_base: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": "Q?", "chosen": "Yes.", "rejected": "No."}]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pairs[0]) + "\n", encoding="utf-8")
    stages = {
        "sft": {"data": {"path": str(tmp_path / "rows.jsonl")}},
        "reward": {"from": "sft", "data": {"path": str(tmp_path / "pairs.jsonl")}},
    }
    recipe = make_recipe(tiny_base, tmp_path, stages=stages)
    adapter = recipe.artifact("reward", tmp_path / "runs").adapter
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    seal(recipe, "reward", tmp_path / "runs", {})
    draw(recipe, tmp_path, replace(PLAIN, judge="reward"), scores=True)  # 0.1 and 0.9

    def label(*words: str) -> tuple[int, str]:
        command = ["label", str(tmp_path / "tiny.yaml"), "sft", "--runs", str(tmp_path / "runs"), *words]
        done = CliRunner().invoke(app, command)
        return done.exit_code, done.output + str(done.exception or "")

    status, told = label("--judge", "reward", "--labels", "7", "--check", "1")
    assert not status and "judge.reward has given 7 votes." in told
    votes = read_votes(tmp_path / "labels" / "judge.reward.jsonl")[0]
    assert [vote.choice for vote in votes] == [1] * 7 and all(vote.share for vote in votes)
    for words, why in (
        (["--judge", "sft"], "--judge sft is neither a finished reward stage"),
        (["--judge", "reward", "--answers", "3"], "--answers does not go with --judge"),
        (["--judge", "http://127.0.0.1:1/v1"], "name the model to ask there"),
        (["--judge", "http://example.com/v1", "--judge-model", "m"], "expected an address on this machine"),
        (["--judge", "reward", "--judge-model", "m"], "leave one of them out"),
        (["--labels", "7"], "are about a judge"),
    ):
        assert why in label(*words)[1], words


def votes_of(people: list[Any], judge: list[Any]) -> list[dict[str, Any]]:
    """A line for each choice, None for none; the pair is the same for both by its place."""
    lines = [said(n, "ada", choice) for n, choice in enumerate(people) if choice is not None]
    return [*lines, *(said(n, "judge.m", choice, judge=True) for n, choice in enumerate(judge) if choice is not None)]


def write(folder: Path, lines: list[dict[str, Any]]) -> str:
    folder.mkdir(exist_ok=True)
    for who in {line["annotator"] for line in lines}:
        mine = [json.dumps(line) + "\n" for line in lines if line["annotator"] == who]
        (folder / f"{who}.jsonl").write_text("".join(mine), encoding="utf-8")
    return str(folder)


def test_a_judge_is_trained_on_if_people_agree_with_it(tmp_path: Path) -> None:
    # Of 20 pairs that both decided they agree on 15. On one more people see a tie, on one both bad, one they skip.
    people = [0] * 15 + [1] * 5 + ["tie", "both_bad", "skip"]
    folder = write(tmp_path / "labels", votes_of(people, [0] * 23 + [1] * 10 + ["tie"]))

    def learn(kind: Any = PREFERENCE, folder: str = folder, **words: Any) -> Source:
        return read_source(folder, kind, DataSpec(path=folder, **words))

    source = learn()
    by = [row["annotator"] for row in source.rows]
    assert (by.count("ada"), by.count("judge.m")) == (20, 11)  # the skipped one, and the ten that nobody has checked
    assert source.layouts["vote of a judge on a pair that people voted on"] == 22
    assert source.layouts["vote of a judge"] == 11 and source.layouts["vote of a judge tie"] == 1
    n, p, z = 20, 0.75, 1.959963984540054
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((centre + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    with pytest.raises(
        UserError, match=rf"judge\.m agrees with people on 75% of 20 pairs \(95 %: {low:.0%} to {high:.0%}\)"
    ):
        learn(judge_agreement=0.76)
    assert len(learn(judge_agreement=0).rows) == 31
    few = write(tmp_path / "few", votes_of([0] * 19, [0] * 30))
    with pytest.raises(UserError, match=r"people have checked 19 pairs on which judge\.m .* and 20 are needed"):
        learn(folder=few)
    assert len(learn(folder=few, judge_agreement=0).rows) == 30
    # Nothing of it is trained on: it need not be trusted. It corrects nothing either.
    whole = write(tmp_path / "whole", votes_of([0] * 5, [1] * 5))
    assert len(learn(folder=whole).rows) == 5
    people_edit = said(50, "ada", 0) | {"edit": {"candidate": 1, "text": "It is so."}}
    edited = write(tmp_path / "edited", [*votes_of([], [0] * 5), people_edit])
    assert len(learn(DEMONSTRATION, edited).rows) == 1


def test_an_untrusted_judge_stops_a_run_and_not_the_page(tiny_base: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "labels", votes_of([0] * 5, [0] * 30))
    stages = {
        "sft": {"data": {"path": str(tmp_path / "rows.jsonl")}},
        "reward": {"from": "sft", "data": {"path": folder}},
    }
    recipe = make_recipe(tiny_base, tmp_path, stages=stages)
    assert open_desk(recipe, PLAIN, tmp_path / "runs").next("eve") is None  # nothing is drawn yet, nothing refused
    command = ["data", str(tmp_path / "tiny.yaml"), "reward", "--runs", str(tmp_path / "runs")]
    told = CliRunner().invoke(app, command)
    shown = " ".join(told.output.split())
    assert isinstance(told.exception, UserError)
    assert "people have checked 5 pairs on which judge.m chose an answer" in shown
    assert "judge.m: 30 votes, agrees with people on 100% of 5 pairs that both decided" in shown
    told = CliRunner().invoke(app, [*command, "-o", "stages.reward.data.judge_agreement=0"])
    assert not told.exception and "voteofajudge25" in "".join(told.output.split())
    # How far a judge is trusted changes nothing of what is learnt.
    trusting = read(str(tmp_path / "tiny.yaml"), "stages.reward.data.judge_agreement=0")
    assert trusting.parts() == recipe.parts()


def test_people_are_weighed_without_the_judge_and_the_judge_beside_them() -> None:
    lines = votes_of([0, 0, 1, 1, "tie", None], [0, 1, 1, 1, "tie", 0])
    second = [said(n, "bo", choice) for n, choice in enumerate([0, 0, 0, 1])]
    votes = [parse(json.dumps(line), "here") for line in [*lines, *second]]
    found, alone = weigh(votes), weigh([vote for vote in votes if not vote.judge])
    assert {**found, "judges": {}} == alone
    judge = found["judges"]["judge.m"]
    # Ada and Bo differ on the third pair: what people say of it is a tie. "tin." is the second in the alphabet.
    assert judge["votes"] == 6 and (judge["share"]["value"], judge["share"]["n"]) == (pytest.approx(2 / 3), 3)
    expected = by_the_definition([[1, 1], [0, 1], [0, 2], [0, 0], [2, 2]], "nominal")
    assert judge["alpha"]["value"] == pytest.approx(expected)
    assert "judge.m: 6 votes, agrees with people on 67% of 3 pairs" in dict(tell(found))["judge"]

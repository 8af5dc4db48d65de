"""A stage is called better or worse by what did not pay it, and only as far as the intervals reach."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from planted import CHAIN, QUESTIONS, answers, evaluation_of_a_run, folder_of_a_run  # noqa: F401

from pipeline.disk.atomic import write_json
from pipeline.evaluate import arena, measures, results, verdicts
from pipeline.evaluate.measure import Measure
from pipeline.evaluate.stored import Results, Verdict, read_results
from pipeline.measure.metric import METRICS
from pipeline.publish import measured
from pipeline.recipe.recipe import Recipe, build
from pipeline.report import opening, page
from pipeline.terminal.results import show_evaluation, show_results


def test_no_stage_is_called_the_best_without_a_verdict(evaluated: Results) -> None:
    words = {name: verdict.model_copy(update={"word": "unclear"}) for name, verdict in evaluated.verdicts.items()}
    assert opening.best(evaluated, words)[0] == "No stage is shown to be better than the base"


def test_nothing_is_claimed_of_a_few_held_out_rows(evaluated: Results) -> None:
    def of_five(found: dict[str, Any]) -> dict[str, Any]:
        return {name: {key: replace(known, n=5) for key, known in told.items()} for name, told in found.items()}

    few = {"numbers": of_five(evaluated.numbers), "changes": of_five(evaluated.changes), "arenas": {}}
    found = verdicts.find(evaluated.model_copy(update=few))
    for name in ("pretrain", "sft", "dpo"):
        assert found[name].word == "unclear" and "oo few to rely on" in found[name].text and "5" in found[name].text
        assert "Better" not in found[name].text
    assert opening.best(evaluated, found)[0] == "No stage is shown to be better than the base"


def test_verdicts_follow_the_planted_truth(evaluated: Results) -> None:
    words = {stage: verdict.word for stage, verdict in evaluated.verdicts.items()}
    assert words["sft"] == "better" and words["ppo"] == "warning" and words["reward"] == "better"
    assert evaluated.over_optimised == {"pretrain": False, "sft": False, "dpo": False, "ppo": True}
    # 40 questions, of which luck gives the expected shares: by hand from the same draw
    luck = numpy.random.default_rng(0).random(QUESTIONS)
    told = evaluated.verdicts["sft"].text
    assert f"{100 * (luck < 0.1).mean():.0f} % to {100 * (luck < 0.6).mean():.0f} %" in told


JUDGED = 400
"""Prompts, of which as many are questions."""
PAID_BY = {"reward": "which it was paid by"}


def compared(
    kind: str = "ppo", truth: int = -2, asked: int = -3, won: int = 59, own: dict[str, str] = PAID_BY, judged: int = 50
) -> Verdict:
    """The verdict on a stage that wins `won` % of the prompts by reward's score and `judged` % by an external judge,
    whose share of right answers is `truth` points higher than its parent's, and `asked` points that of questions."""
    place = numpy.arange(JUDGED)

    def right(points: int) -> tuple[Any, Any]:
        """Of parent and stage: `points` more, beside 5 points that were lost and won again."""
        before, after = place < JUDGED // 2, place < JUDGED // 2
        after[: 4 * (5 + max(-points, 0))], after[-4 * (5 + max(points, 0)) :] = False, True
        return before, after

    won_K = numpy.random.default_rng(3).permutation(place) < 4 * won
    gold, known = right(truth), right(asked)
    taken: list[tuple[Measure, Any]] = []
    for i, (policy, score) in enumerate((("sft", numpy.zeros(JUDGED)), (kind, numpy.where(won_K, 1.0, -1.0)))):
        value = answers(numpy.random.default_rng(4), gold[i][:, None], 0.0, None)
        told = {**value, "scores": {"reward": score[:, None].tolist()}}
        of = {"right": known[i].tolist(), "exact": known[i].tolist(), "f1": known[i].astype(float).tolist()}
        of |= {"text": ["so"] * JUDGED, "stopped": [True] * JUDGED}
        for measure, value in ((measures.Answers(policy, []), told), (measures.Questions(policy, []), of)):
            taken.append((measure, {"seconds": 1.0, "rows": [], "value": value}))
    chain = [
        CHAIN[1].model_copy(update={"parent": None}),
        CHAIN[4].model_copy(update={"name": kind, "kind": kind, "own_judges": own}),
    ]
    points = place < 4 * judged
    held = arena.Played(["sft", kind], numpy.array([[[0.5, 1 - p], [p, 0.5]] for p in points.astype(float)]))
    return results.make(taken, chain, held.described(model="m")).verdicts[kind]


def test_a_stage_is_not_better_by_what_paid_it() -> None:
    """Its reward is higher 59 times of 100, truth 2 and questions 3 points lower: nothing shows it to be better."""
    found = compared()
    assert found.word == "unshown" and found.text.startswith("Higher reward; not shown to be better than sft: ")
    for told in (
        "wins 59 % (",
        "by reward's score, which it was paid by",
        "wins 49 % (",
        "\u22123 points, 95 %: \u2212",
    ):
        assert told in found.text, told
    assert "Better than" not in found.text
    assert compared(own={}).word == "better"  # by a judge of other pairs, which did not pay it
    assert compared(kind="dpo", own={"reward": "which saw 9 of its 9 pairs"}).word == "unshown"


OWN = {"reward": 0.5}, {"reward": 1.1, "reward_gain": 0.6, "reward_gain_low": 0.4, "reward_gain_high": 0.8}


def of_itself(run: tuple[Recipe, Path], before: dict[str, float], after: dict[str, float], **reward: Any) -> Recipe:
    """The run with these numbers in the manifest of its ppo stage."""
    recipe, runs = run
    tree = json.loads(json.dumps(recipe.tree))
    tree["stages"]["ppo"] |= reward
    artifact = recipe.artifact("ppo", runs)
    artifact.seal(artifact.finished().model_copy(update={"before": before, "after": after}))
    return build(tree)


def shown(recipe: Recipe, runs: Path) -> str:
    """What `onebase run` ends with and `onebase status` shows."""
    from rich.console import Console

    console = Console(width=300, record=True)
    show_results(recipe, runs, console)
    return console.export_text(styles=True)


def test_terminal_page_and_card_do_not_call_what_was_paid_better(run: tuple[Recipe, Path]) -> None:
    recipe, runs = run
    evaluation = runs / recipe.name / "evaluation" / "results.json"
    evaluated = evaluation.read_text()
    evaluation.unlink()
    asked = {"question_accuracy": 0.6}, {"question_accuracy": 0.57}
    recipe = of_itself(run, OWN[0] | asked[0], OWN[1] | asked[1])
    said = (
        "Higher reward; not shown to be better: that is what it was paid by. Questions answered right \u22123 points."
    )
    assert f"ppo: {said}" in shown(recipe, runs)
    assert "\x1b[32m+0.600" not in shown(recipe, runs)  # not green
    for path in page.write(recipe, "my.yaml", runs):
        assert said in path.read_text(), path
    section = recipe.stages["ppo"].model_dump(by_alias=True)
    entry = recipe.artifact("ppo", runs).finished().model_copy(update={"section": section})
    sealed_ = SimpleNamespace(artifact=recipe.artifact("ppo", runs), known=[entry])
    assert f"**ppo**: {said}" in measured.table(sealed_)  # type: ignore[arg-type]
    # An evaluation of these adapters has the better word, one of others has none.
    evaluation.write_text(evaluated)
    known = read_results(evaluation.parent)
    assert known is not None
    for other, by in (("", "ppo, by onebase eval: Over-optimised"), ("0", f"ppo: {said}")):
        chain = []
        for stage in known.chain:
            files = recipe.artifact(stage.name, runs).finished().files
            chain.append(stage.model_copy(update={"adapter": f"{files['adapter_model.safetensors']}{other}"}))
        write_json(evaluation, known.model_copy(update={"chain": chain}).sealed())
        assert by in shown(recipe, runs)
        assert ("**ppo**: Over-optimised" in measured.table(sealed_)) == (not other)  # type: ignore[arg-type]


def test_a_checked_truth_speaks_for_a_stage_or_against_it(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def right(completions, **columns): return [1.0] * len(completions)\n")
    (run[1] / "tiny" / "evaluation" / "results.json").unlink()
    truth = f"{tmp_path}/f.py:right"
    reward = [{"source": "reward"}, {"source": truth, "weight": 0, "truth": True}]
    for gain, says in (
        ((0.135, 0.056, 0.215), "Higher reward, and more sampled answers right: +14 points, 95 %: +6 to +22."),
        (
            (0.02, -0.03, 0.07),
            "not shown to be better: that is what it was paid by. Within chance: sampled answers right",
        ),
        ((-0.1, -0.15, -0.05), "Over-optimised: higher reward, but fewer sampled answers right: \u221210 points"),
    ):
        own = {f"reward/{truth}_gain{end}": value for end, value in zip(("", "_low", "_high"), gain, strict=True)}
        share = {f"reward/{truth}": 0.5}, {f"reward/{truth}": 0.5 + gain[0]}
        told = shown(of_itself(run, OWN[0] | share[0], OWN[1] | share[1] | own, reward=reward), run[1])
        assert says in told
        plain = re.sub(r"\x1b\[[\d;]*m| (?= )", "", told)
        assert f"sampled answers right 50.0 % {50 + 100 * gain[0]:.1f} %" in plain
        assert "by f.py:right, not paid" in plain
        assert f"95 %: {100 * gain[1]:+.1f} to {100 * gain[2]:+.1f}".replace("-", "\u2212") in plain


def test_what_is_independent_decides() -> None:
    better = compared(truth=20)
    assert better.word == "better" and better.text.startswith("Better than sft: ")
    assert "Higher reward too: wins 59 %" in better.text
    assert compared(asked=20).word == "better" and compared(judged=80).word == "better"
    for fallen in (compared(truth=-30), compared(asked=-25)):
        assert fallen.word == "warning" and fallen.text.startswith("Over-optimised: wins 59 %")
    worse = compared(judged=20)
    assert worse.word == "worse" and worse.text.startswith("Worse than sft: wins 2")
    assert "Higher reward all the same: wins 59 %" in worse.text
    mixed = compared(truth=30, asked=-25, won=50)
    assert mixed.word == "warning" and mixed.text.startswith("Better and worse than sft: ")
    assert compared(won=30).word == "worse"  # its own judge can speak against it
    assert compared(won=50).word == "unclear"


def test_best_of_n_takes_part_and_beats_what_it_is_drawn_from(evaluated: Results) -> None:
    by_reward = evaluated.arenas["reward"]
    assert by_reward.wins["best of 16"]["sft"].low > 0.8
    assert by_reward.elo["ppo"].value > by_reward.elo["sft"].value
    assert evaluated.arenas["truth"].elo["sft"].value > evaluated.arenas["truth"].elo["ppo"].value
    assert [found["kl"].value for found in evaluated.steps["ppo"].values()] == pytest.approx([1, 2], abs=0.2)
    rewards = [point.proxy.value for point in evaluated.best_of_n.points]
    assert rewards == sorted(rewards)
    assert evaluated.best_of_n.points[-1].kl == pytest.approx(math.log(64) - 63 / 64)


def test_the_terminal_shows_verdicts_and_intervals(evaluated: Results) -> None:
    from rich.console import Console

    read_back = Results.model_validate(json.loads(json.dumps(evaluated.model_dump())))
    for columns in (300, 80, 60, 40):
        console = Console(width=columns, file=io.StringIO(), record=True)
        show_evaluation(read_back, console)
        told = console.export_text()
        assert "Over-optimised" in told and re.search(r"answered +\d+ %| answered right +\d+ %", told)
        assert max(len(line.rstrip()) for line in told.splitlines()) <= columns
        for numbers in evaluated.numbers.values():  # each value and interval stands whole, in a column of its own
            for metric in (metric for metric in METRICS if metric.name in numbers):
                found = numbers[metric.name]
                assert f" {metric.written(found.value)}" in told and f" {metric.range(found)}" in told

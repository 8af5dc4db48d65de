"""What each round has brought: labels spent, how far people agree, and the numbers of its stages."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.data.votes import of_round, read_votes
from pipeline.evaluate.stored import Numbers, Results
from pipeline.label.agreement import weigh
from pipeline.language.say import say
from pipeline.measure.metric import PREFERENCE_ACCURACY, QUESTION_ACCURACY, REWARD, TRUTH, Estimate, Metric
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.waiting import folders, policy, progress
from pipeline.stages import STAGES

AGREEMENT = Metric("agreement", "agreement (alpha)")
RANKED = STAGES["reward"].headlines[0]
SHOWN = (AGREEMENT, REWARD, TRUTH, QUESTION_ACCURACY, PREFERENCE_ACCURACY, RANKED)


@dataclass(frozen=True)
class Round:
    """`number` 0 is the policy that the first round draws from, before anybody has voted."""

    number: int
    stage: str
    labels: int
    so_far: int
    """Labels of this round and all before it."""
    numbers: Numbers
    """Of the metrics SHOWN, those that were measured."""

    @property
    def heading(self) -> str:
        return say("{heading}: ", heading=self.number) + self.stage if self.stage else str(self.number)


def rounds(recipe: Recipe, results: Results | None) -> list[Round]:
    """Those of which there is a vote, after the policy that they begin with. Numbers are those of an evaluation."""
    if recipe.spec.rounds is None:
        return []
    of_policies = results.numbers if results else {}
    first = policy(recipe, 1)
    found = [Round(0, first, 0, 0, _shown(of_policies.get(first, {})))]
    for number in range(1, recipe.spec.rounds.count + 1):
        there = [folder for path in folders(recipe) if (folder := of_round(path, number)).is_dir()]
        votes = [vote for folder in there for vote in read_votes(folder)[0]]
        if not votes:
            break
        own = [name for name in recipe.order() if recipe.round_of(name) == number]
        policies = [name for name in own if name in of_policies]
        models = [name for name in own if results and name in results.reward_models]
        numbers = dict(of_policies[policies[-1]]) if policies else {}
        if results and models:
            numbers[RANKED.name] = results.reward_models[models[-1]].accuracy
        if alpha := weigh(votes)["alpha"]["choice"]:
            numbers[AGREEMENT.name] = Estimate(**alpha)
        labels = progress(recipe, number).labels
        stage = (policies or models or [""])[-1]
        found.append(Round(number, stage, labels, found[-1].so_far + labels, _shown(numbers)))
    return found if len(found) > 1 else []


def _shown(numbers: Numbers) -> Numbers:
    return {metric.name: numbers[metric.name] for metric in SHOWN if metric.name in numbers}


def measured(found: list[Round]) -> list[Metric]:
    """Those that any round has."""
    return [metric for metric in SHOWN if any(metric.name in one.numbers for one in found)]

"""What an evaluation leaves in a run's folder: results.json, typed, and whether it and each measure still hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.disk.atomic import Json, digest, read_json
from pipeline.errors import UserError
from pipeline.evaluate.measure import Measure
from pipeline.measure.calibration import Bin
from pipeline.measure.metric import Estimate, Metric
from pipeline.recipe.recipe import Recipe

RESULTS = 9
"""Counts up when results.json says something else or in another way."""
Numbers = dict[str, Estimate]
"""By the name of a metric."""


class Written(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Link(Written):
    """A finished stage of the chain."""

    name: str
    kind: str
    parent: str | None
    """The stage whose policy it goes on from."""
    answers: bool
    rewards: list[str] = []
    """What it is paid by."""
    own_judges: dict[str, str] = {}
    """The judges that it was trained on, each with how."""
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    """The numbers it took of itself."""
    adapter: str = ""
    """The sha256 of its weights."""
    held_out: str = ""
    """The measure of the loss on its held-out rows; "" if it has none."""
    asked: list[int] = []
    """The places of its questions among those of the run."""

    @classmethod
    def of(cls, recipe: Recipe, name: str, **measured: Any) -> Link:
        """What the recipe says of a stage, with what was measured of it."""
        section = recipe.stages[name]
        return cls(
            name=name,
            kind=section.kind,
            parent=section.from_,
            answers=recipe.kind(name).answers,
            rewards=[term.source for term in section.reward_terms()],
            **measured,
        )


class Third(Written):
    """A third of the pairs by margin, from the closest calls to the clearest."""

    low: float
    high: float
    right: Estimate


class RewardModel(Written):
    accuracy: Estimate
    longer_wins: Estimate
    bag_of_words: Estimate
    over_longer: Estimate
    """Accuracy less that of "the longer answer wins"."""
    over_words: Estimate
    by_margin: list[Third]
    by_length: Numbers
    by_guideline: Numbers
    prefers_longer: Estimate | None
    longer_is_better: float | None
    lean: Estimate | None
    """By how much more often it is right where the better answer is the longer one."""
    length_correlation: float | None
    """Spearman's, of score and length."""
    reliability: list[Bin]
    ece: float
    """Expected calibration error."""
    scores: dict[str, list[float]]
    flags: list[str]
    disagreement: Numbers = {}
    """Of the heads, as heads.disagreement names it; empty where there is one."""


class Arena(Written):
    """Every policy against every other by one judge."""

    names: list[str]
    elo: Numbers
    wins: dict[str, Numbers]
    """wins[a][b]: the share that a wins against b, where the two have met."""
    model: str = ""
    """Of an external judge, with how many of its replies were no verdict."""
    unread: int = 0


class People(Written):
    """Who compared the stages in the arena, and how often."""

    votes: dict[str, int]
    """Of every stage, the votes in which it stood."""
    prompts: int
    people: int
    earlier: int
    """Votes on answers of an adapter that is not there any more: they do not count."""
    agreement: Estimate | None
    """Krippendorff's alpha over the pairs that several people saw."""


class Point(Written):
    """Best of n: KL from the policy that was sampled (nats an answer), the reward chosen by, and the gold measure."""

    n: int
    kl: float
    proxy: Estimate
    gold: Estimate | None
    coverage: Estimate | None
    """Share of prompts for which at least one of the n answers is right (pass@n)."""


class Curve(Written):
    policy: str
    proxy: str
    prompts: int
    points: list[Point]
    gold_gained: Estimate | None
    """From the first n to the last."""


class Said(Written):
    text: str
    right: bool | None
    """None where nothing checks it."""


class Sample(Written):
    prompt: Any
    answer: str | None
    told: dict[str, Said]
    """By policy."""


class Compared(Written):
    """A metric of a task of lm-eval, for every policy, and each stage's change from its parent."""

    task: str
    metric: str
    n: int
    better: Literal["higher", "lower"]
    percent: bool
    numbers: Numbers
    changes: Numbers

    @property
    def shown(self) -> Metric:
        label = f"{self.task}: {self.metric}, {self.n} items"
        return Metric(f"{self.task}/{self.metric}", label, self.better, "%" if self.percent else "", digits=3)


class Kept(Written):
    """A number of a stage's held-out rows or questions: of that stage, and of a policy that comes from it."""

    before: Estimate
    after: Estimate
    change: Estimate
    """Row by row."""


class Verdict(Written):
    word: str
    """better, worse, unclear, unshown (better only in what it was trained on) or warning."""
    text: str


class Results(Written):
    chain: list[Link]
    parents: dict[str, str]
    proxy: str | None
    """The judge that stands for the reward."""
    numbers: dict[str, Numbers]
    """Of every policy."""
    few_shot: Numbers | None
    changes: dict[str, Numbers]
    """Of every stage, from the policy it goes on from."""
    reward_models: dict[str, RewardModel]
    arenas: dict[str, Arena]
    """By judge; that of people is named "people"."""
    best_of_n: Curve | None
    steps: dict[str, dict[str, Numbers]]
    """Of a policy on its way, by step."""
    lengths: dict[str, list[int]]
    """Of sampled answers, in tokens."""
    samples: list[Sample]
    seconds: float
    benchmarks: list[Compared]
    over_optimised: dict[str, bool]
    forgetting: dict[str, dict[str, dict[str, Kept]]]
    """Of a policy, against every stage that it comes from: each number of what that stage had learnt."""
    people: People | None = None
    """Of the arena of people, where there is one."""
    verdicts: dict[str, Verdict] = {}
    tasks: list[str] = []
    """Of lm-eval, as they were asked for."""
    made_of: dict[str, str] = {}
    """The fingerprint of every measure's file."""

    def sealed(self) -> Json:
        """What goes into results.json, with a digest by which a change of it is told."""
        written = self.model_dump()
        return {**written, "digest": digest([RESULTS, written])}

    @property
    def rewarded(self) -> bool:
        """Whether anything here is paid."""
        return any("reward" in numbers for numbers in self.numbers.values())

    def columns(self) -> dict[str, Numbers]:
        """The numbers of every policy, as a table has them; the base with examples stands beside the base without."""
        columns: dict[str, Numbers] = {}
        for policy, numbers in self.numbers.items():
            if policy == "base" and self.few_shot:
                columns |= {"base, zero-shot": numbers, "base, few-shot": self.few_shot}
            else:
                columns[policy] = numbers
        return columns


def folder(recipe: Recipe, runs: Path) -> Path:
    return runs / recipe.name / "evaluation"


def read_results(where: Path) -> Results | None:
    """The results of the last evaluation; None if there was none.

    Raises UserError if the file is damaged, was changed since it was written, or is another version's.
    """
    file = where / "results.json"
    try:
        known = read_json(file)
        if known is None:
            return None
        results = Results.model_validate({key: value for key, value in known.items() if key != "digest"})
        if results.sealed()["digest"] == known.get("digest"):
            return results
    except (UserError, ValidationError):
        pass
    raise UserError(f"{file} is damaged, was changed by hand, or is of another version. Make it anew: onebase eval")


def read_fresh(measure: Measure, where: Path) -> Json | None:
    """What was measured before, if nothing has changed since, the file itself included."""
    try:
        known = read_json(where / measure.file) or {}
    except UserError:
        return None
    whole = known.get("value_digest") == digest(known.get("value"))
    return known if whole and known.get("fingerprint") == measure.fingerprint else None

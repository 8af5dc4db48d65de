"""What a stage is. A stage never opens a recipe, never looks for its parent on disk, never decides whether to run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.data.contracts import PREFERENCE, Contract, Row
from pipeline.data.load import DataSpec
from pipeline.data.render import Encoded
from pipeline.disk import metrics
from pipeline.disk.artifact import Artifact
from pipeline.disk.manifest import Table
from pipeline.errors import complaint
from pipeline.language.say import say
from pipeline.measure.metric import Metric
from pipeline.models.spec import ModelSpec
from pipeline.ppo.engine_settings import EngineSettings
from pipeline.ppo.rejection_settings import RejectionSettings
from pipeline.ppo.settings import RolloutSettings, Sampling
from pipeline.stages.arguments import ConfigClass, check_train, defaults, undefined
from pipeline.stages.reward_term import RewardTerm
from pipeline.training.trackers import Trackers

BASE = "base"
"""The policy that has no adapter."""


class StageSpec(BaseModel):
    """One section under `stages:` of a recipe. Each stage has a class of its own, told apart by `kind`."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    config_class: ClassVar[ConfigClass]
    """Whose words `train:` takes: a trainer's config of TRL by name, or a class of ours."""

    kind: str
    """Which stage this is; the section's own name unless said otherwise."""
    from_: str | None = Field(default=None, alias="from")
    """The stage whose adapter this one goes on with; none for the first of a chain."""
    data: DataSpec
    train: dict[str, Any] = {}
    """The trainer's own arguments, word for word."""

    @field_validator("train")
    @classmethod
    def _trainer_takes_it(cls, train: dict[str, Any]) -> dict[str, Any]:
        check_train(train, cls.config_class)
        return train

    def check_among(self, stages: dict[str, Stage], *place: str) -> None:
        """Raises a complaint about what it says of files, or of the recipe's stages. `place` is its own."""

    def check_rows(self, train: Sequence[Row], test: Sequence[Row] | None) -> None:
        """Raises UserError for rows that are fit each by itself and not together."""

    def warn_rows(self, train: Sequence[Row], test: Sequence[Row] | None) -> list[str]:
        """What speaks against its rows and does not stop it."""
        return []

    def mismatches(self) -> bool:
        """Whether each batch goes through policy and reference once more, each prompt with another row's answer."""
        return False

    def question_file(self) -> str | None:
        """Of those that are asked before and after the stage."""
        return None

    def learns_again(self) -> dict[str, str]:
        """The kinds of stages that its policy comes from whose rows it learns again, each with the key that says so. Of
        each kind it is the nearest stage."""
        return {}

    def asked_with(self) -> str | None:
        """The environment whose tools its rows tell of and its policy is asked with."""
        return None

    def replayed(self) -> dict[str, float]:
        """Stages that its policy comes from whose rows it learns again, each with how much they count."""
        return {}

    def mixed_in(self) -> dict[str, float]:
        """Those of them whose rows are among those it trains on, each with their share."""
        return {}

    def rollouts(self) -> RolloutSettings | None:
        """How it samples and learns in turn; None for a stage that does not."""
        return None

    def samples_first(self) -> RejectionSettings | None:
        """How it samples all its answers before it trains, as sft does, on those that it keeps; None for a stage that
        does not."""
        return None

    def sampling(self) -> Sampling | None:
        """How it samples the answers that it learns from, one way or the other."""
        return self.rollouts() or self.samples_first()

    def engine(self) -> EngineSettings | None:
        """The program that samples them in its place."""
        return None

    def reward_terms(self) -> list[RewardTerm]:
        """What it is paid by."""
        return []

    @property
    def score_heads(self) -> int:
        """Of a reward model, whose score is their mean."""
        return 1

    def further_parts(self) -> dict[str, Any]:
        """What its adapter depends on, of the words that only its kind of section has."""
        return self.model_dump(exclude=set(PolicySpec.model_fields))

    def source_numbers(self) -> list[str]:
        """The held-out numbers of each source of its reward."""
        ends = ("", "_gain", "_gain_low", "_gain_high")
        terms = self.reward_terms()
        apart = [f"score_deviation/{term.source}" for term in terms if term.is_stage]
        return [f"reward/{term.source}{end}" for term in terms for end in ends] + apart


class PolicySpec(StageSpec):
    """The section of a stage that leaves a policy, which can be asked things."""

    questions: str | None = None
    """Held-out questions with answers ({"prompt", "answer"} rows), asked before and after the stage."""
    environment: str | None = None
    """A Python class as `path.py:Class`, whose methods are tools: its rows tell the model of them, and whenever the
    model is asked something and calls one, it is run (docs/tools.md)."""

    def question_file(self) -> str | None:
        return self.questions

    def asked_with(self) -> str | None:
        return self.environment

    def check_among(self, stages: dict[str, Stage], *place: str) -> None:
        if self.environment is None:
            return
        file, _, name = self.environment.rpartition(":")
        if not file.endswith(".py") or not os.path.isfile(file):
            raise complaint(f"no such file: {file or name}; expected path.py:Class", *place, "environment")
        if problem := undefined(file, name):
            raise complaint(problem, *place, "environment")


@dataclass(frozen=True)
class Stage:
    section: type[StageSpec]
    """Its section of a recipe."""
    contract: Contract
    headlines: tuple[Metric, ...]
    """The held-out numbers by which people judge it."""
    numbers: tuple[str, ...]
    """Every held-out number it can leave in its manifest, which a recipe may make demands of; a source of a reward adds
    some (StageSpec.source_numbers)."""
    encode: Callable[[Any, Row], list[Encoded]]
    """(tokenizer, row): the row as the model sees it, one sequence, or of a comparison the chosen and the rejected one.
    Raises Unrenderable."""
    run: Callable[[Any, Context], Result]
    """(its section, context)"""
    learns: str = ""
    """What it learns, in one sentence for a person who sees it begin."""
    colour: str = "#5b6470"
    """In the report's pictures."""
    house: dict[str, Any] = field(default_factory=dict)
    """The trainer's words that this stage takes otherwise than its config does, where a recipe does not say them."""
    score_head: bool = False
    """Whether it leaves a reward model: a score head in place of the LM head."""
    sequences: int = 1
    """That a row gives: of a comparison two."""
    every_token: bool = False
    """Whether all of a row carries loss, and not only what the assistant says."""
    reference: bool = False
    """Whether each batch goes through the adapter as it was at the start as well."""
    checkpoints: int = 1
    """Kept where a recipe does not say how many."""
    held_out_loss: Metric | None = None
    """The loss on rows like its own, as an evaluation takes it; None where its rows carry no loss of tokens."""
    raises: str = ""
    """The held-out number that it is trained to raise, which therefore does not show that it is better."""
    arithmetic: int = 1
    """Counts up when the stage would make another adapter of the same inputs: what was trained before is then stale."""

    @property
    def name(self) -> str:
        return str(self.section.model_fields["kind"].default)

    @property
    def learnt(self) -> Literal["", "answers", "everything"]:
        """Which tokens of a row carry loss."""
        return "" if self.held_out_loss is None else "everything" if self.every_token else "answers"

    @property
    def ranks(self) -> bool:
        """Whether it leaves a reward model, whose score ranks answers."""
        return self.score_head and self.contract is PREFERENCE

    @property
    def raised(self) -> Metric | None:
        """The headline of that number."""
        return next((metric for metric in self.headlines if metric.name == self.raises), None)

    @property
    def answers(self) -> bool:
        """Whether it leaves a policy, which can be asked things (a reward model cannot)."""
        return issubclass(self.section, PolicySpec)

    @property
    def config_class(self) -> ConfigClass:
        return self.section.config_class

    def arguments(self, section: StageSpec) -> dict[str, Any]:
        """The trainer's arguments: what the section says, then what this stage takes otherwise, then the defaults."""
        return {**defaults(self.config_class), **self.house, **section.train}


@dataclass(frozen=True)
class Earlier:
    """The training rows of a stage that the policy comes from."""

    kind: Stage
    section: StageSpec
    rows: Sequence[Row]


@dataclass(frozen=True)
class Rows:
    """A stage's data, loaded and checked already."""

    train: Sequence[Row]
    test: Sequence[Row] | None = None
    questions: Sequence[Row] = field(default_factory=list)
    earlier: dict[str, Earlier] = field(default_factory=dict)
    """What it learns again of earlier stages, by their names."""


@dataclass(frozen=True)
class Context:
    """All that a run may look at besides its own section."""

    model: ModelSpec
    data: Rows
    parents: dict[str, Artifact]
    out: Artifact
    seed: int
    fingerprint: str
    claim: Callable[[], Path | None]
    """Makes the folder this run's own, removing what another recipe left, and gives the checkpoint to go on from, or
    None to start at the beginning. Called once everything that can be refused has been accepted."""
    questions_hash: str | None = None
    """Of the file of questions, to know whether a parent was asked the same."""
    trained: Path | None = None
    """The adapter that this stage has made already, where it is only to be measured again."""
    after_training: float | None = None
    """Seconds from the last step of this stage to the end of the run, as estimated; None where nothing is known."""
    trackers: Trackers = field(default_factory=Trackers)

    def tell_loading(self) -> None:
        _tell(say("loading the base"))

    def tell_measuring(self, when: Literal["before", "after"]) -> None:
        if self.data.test or self.data.questions:
            _tell(
                say("measuring on held-out rows before training")
                if when == "before"
                else say("measuring on held-out rows after training")
            )

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Note what was measured at an optimizer step."""
        metrics.append(self.out.metrics, step, values)
        self.trackers.log(step, values)


def _tell(what: str) -> None:
    """By the first process alone: what takes a while is not passed over in silence."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(f"  {what}", flush=True)


@dataclass
class Result:
    """What a stage reports: numbers, the counts of its rows, and the invariants it has checked."""

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    invariants: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    """Rows left out for their length, each {place, reason}."""
    base_digest: str = ""
    tables: list[Table] = field(default_factory=list)
    """What it tells of its held-out rows besides its numbers."""
    labels: list[str] = field(default_factory=list)
    """Of a classifier: what each output of its head stands for."""
    several_labels: bool = False
    """Whether a text may have several of them."""
    head_means: list[float] = field(default_factory=list)
    """Of a reward model with several heads: each one's mean score of training answers, its zero."""
    length_slope: float | None = None
    """Of a reward model: by how much its score grows with each token of an answer."""

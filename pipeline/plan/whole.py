"""How long a whole stage takes: its start, its training, and what is asked of it before and after. Plain Python.

Meant to tell minutes from hours before a run begins; `onebase plan` has the figures of a training step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pipeline.plan.cards import Card
from pipeline.plan.lengths import ENDED, Lengths
from pipeline.plan.memory import Model
from pipeline.plan.sizes import ANSWER_TOKENS, EVALUATION_TOKENS, HELD_OUT_ANSWERS, NEW_TOKENS
from pipeline.plan.stage import ANSWER_SHARE, plan_stage, work_of
from pipeline.plan.time import forward_seconds, ppo_seconds

if TYPE_CHECKING:
    from pipeline.models.spec import ModelSpec
    from pipeline.stages.stage import Stage, StageSpec

START = 13.0
"""Seconds until a process has its libraries and a small base."""
CLOSE = 3.0
"""Those in which a stage checks its base, saves its adapter and ends its process."""
READ = 0.5e9
"""Bytes of a base's weights that are read and quantised in a second."""
TEMPLATE = 8
"""Tokens that a chat template adds to a short row."""


@dataclass(frozen=True)
class RowTokens:
    """What a stage reads, by the tokens of each row."""

    train: list[int]
    held_out: list[int]
    questions: list[int]
    asked_before: bool
    """Whether the questions are new to it: what its parent was asked after training is not asked again."""
    again: list[list[int]] = field(default_factory=list)
    """Of each earlier stage whose rows it learns again."""


@dataclass(frozen=True)
class Duration:
    """Seconds of a stage."""

    start: float
    """Until its first step, held-out rows and questions included."""
    training: float
    after: float

    @property
    def whole(self) -> float:
        return self.start + self.training + self.after


def stage_duration(
    kind: Stage, section: StageSpec, model: Model, spec: ModelSpec, rows: RowTokens, card: Card
) -> Duration | None:
    """None where the card's speed is not known. Raises UserError for what is not planned."""
    if card.teraflops is None or card.bandwidth is None:
        return None
    lengths = Lengths([tokens + TEMPLATE for tokens in rows.train], rows.again)
    training = _training(kind, section, model, spec, lengths, card)
    if training is None:
        return None
    measured = _held_out(kind, section, model, spec, rows.held_out, lengths, card)
    asked = _questions(model, rows.questions, card)
    loading = START + model.shapes.parameters * 2 / READ
    return Duration(loading + measured + asked * rows.asked_before, training, measured + asked + CLOSE)


def _training(
    kind: Stage, section: StageSpec, model: Model, spec: ModelSpec, lengths: Lengths, card: Card
) -> float | None:
    rollouts = section.rollouts()
    if rollouts is None:
        minutes = plan_stage(kind, section, model, spec, lengths, card).minutes
        return None if minutes is None else minutes * 60
    work = work_of(kind, section, model, spec, lengths, card)
    work = replace(
        work,
        length=round(_mean(lengths.rows) + ENDED * work.answer),
        answer=round(ENDED * work.answer),
        again=tuple(round(_mean(tokens)) + TEMPLATE for tokens in lengths.again),
    )
    seconds = ppo_seconds(model, work, card, rollouts.epochs)
    return None if seconds is None else seconds * rollouts.steps * rollouts.batch_size / work.episodes


def _held_out(
    kind: Stage,
    section: StageSpec,
    model: Model,
    spec: ModelSpec,
    held_out: list[int],
    lengths: Lengths,
    card: Card,
) -> float:
    """The held-out rows once through the model; of a stage that samples, answers to them and their scores."""
    if not held_out:
        return 0.0
    mean = _mean(held_out) + TEMPLATE
    if section.sampling() is None:
        tokens, share = len(held_out) * kind.sequences * mean, 1.0 if kind.every_token else ANSWER_SHARE
        share = 0.0 if kind.score_head else share
        return forward_seconds(model, card, tokens, mean, max(1.0, tokens / EVALUATION_TOKENS), share)
    work = work_of(kind, section, model, spec, lengths, card)
    work = work.sampled or work
    answer = round(ENDED * work.answer)
    at_once = min(work.episodes, HELD_OUT_ANSWERS * len(held_out))
    work = replace(work, length=round(mean + answer), answer=answer, episodes=at_once)
    seconds = ppo_seconds(model, work, card, epochs=0)
    return 0.0 if seconds is None else seconds * HELD_OUT_ANSWERS * len(held_out) / at_once


def _questions(model: Model, questions: list[int], card: Card) -> float:
    """Greedy answers, a batch at a time; each step of a batch is a pass of one token an answer."""
    if not questions:
        return 0.0
    mean = _mean(questions) + TEMPLATE
    batches = max(1.0, len(questions) * (mean + NEW_TOKENS) / ANSWER_TOKENS)
    tokens = len(questions) * (mean + ENDED * NEW_TOKENS)
    return forward_seconds(model, card, tokens, mean, batches * NEW_TOKENS, ENDED)


def _mean(numbers: Sequence[int]) -> float:
    return sum(numbers) / len(numbers)

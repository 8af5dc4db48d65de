"""What an answer is worth: reward models, Python functions, or a weighted sum of both."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.data import render
from pipeline.data.tokens import without_marks
from pipeline.errors import UserError
from pipeline.measure import heads
from pipeline.models import processes
from pipeline.models.dialogue import Told
from pipeline.models.own_code import load_named
from pipeline.ppo import algorithm
from pipeline.ppo.actors import Actors
from pipeline.ppo.shipped import SHIPPED

LARGEST = 1e30
"""Bound of what a function may return: the variance of scores beyond it is no number any more."""


@dataclass(frozen=True)
class Source:
    """One term of the reward: a borrowed reward adapter or a function."""

    name: str
    weight: float
    adapter: str | None = None
    function: Callable[..., Any] | None = None
    truth: bool = False
    """Whether it must say 0 or 1."""
    head_means: tuple[float, ...] = ()
    """Of a reward model with several heads: each one's zero. Empty where there is one."""
    lower_bound: float = 0.0
    """How many deviations over the heads are taken from a score."""
    length_penalty: float = 0.0
    """What is taken from a score for each token of the answer."""


def adapter_name(stage: str) -> str:
    """Under which a reward stage's adapter lies on the policy's base."""
    return f"reward-{stage}"


def source(name: str, weight: float, truth: bool = False, **of_a_model: Any) -> Source:
    """From what a recipe names: a stage, a function that comes with OneBase, `path.py:function`, or an environment's
    class that scores its own answers by a method get_reward, as TRL's do. `of_a_model`: further fields of a stage's."""
    if name in SHIPPED:
        return Source(name, weight, function=SHIPPED[name], truth=truth)
    if ".py:" in name:
        named = load_named(name, "reward")
        function = _ask_environments if isinstance(named, type) else named
        return Source(name, weight, function=function, truth=truth)
    return Source(name, weight, adapter=adapter_name(name), **of_a_model)


def scores(
    sources: list[Source],
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    told: Sequence[Told],
    at_once: int,
) -> dict[str, list[float]]:
    """What every source says of each answer, by the source's name; beside it, of a reward model with several heads,
    their deviation (`score_deviation/<name>`), and what is taken for length where anything is (`score_length/<name>`).

    A reward model reads prompt and answer rendered anew as a whole conversation, as it did in training: what follows an
    answer's end-of-turn token in the template was never sampled.
    """
    said: dict[str, list[float]] = {}
    for source in sources:
        if source.adapter is None:
            said[source.name] = _call(source, told)
            continue
        sequences = [conversation(tokenizer, one) for one in told]
        by_head_NK = actors.head_scores(source.adapter, sequences, at_once)
        said[source.name] = [sum(heads_K) / len(heads_K) for heads_K in by_head_NK]
        if source.head_means:
            said[f"score_deviation/{source.name}"] = heads.deviations(by_head_NK, source.head_means).tolist()
        if source.length_penalty:
            lengths = [len(one.episode.sampled) for one in told]
            said[f"score_length/{source.name}"] = [source.length_penalty * length for length in lengths]
    return said


def total(sources: list[Source], scores: dict[str, list[float]]) -> list[float]:
    """The reward of each answer: the weighted sum of what its sources pay. A source of weight 0 is measured and pays
    nothing."""
    weighted = ([source.weight * value for value in _paid(source, scores)] for source in sources)
    return [sum(values) for values in zip(*weighted, strict=True)]


def _paid(source: Source, scores: dict[str, list[float]]) -> list[float]:
    """What a source pays for each answer: its score, less so many deviations over its heads (the lower confidence
    bound; arXiv 2310.02743, section 3, with the variance), less what it owes to length."""
    paid = scores[source.name]
    if source.lower_bound:
        apart = scores[f"score_deviation/{source.name}"]
        paid = [score - source.lower_bound * deviation for score, deviation in zip(paid, apart, strict=True)]
    if source.length_penalty:
        owed = scores[f"score_length/{source.name}"]
        paid = [score - length for score, length in zip(paid, owed, strict=True)]
    return paid


def columns(sources: list[Source], scores: dict[str, list[float]]) -> dict[str, list[float]]:
    """The scores by the names that metrics and tables have: `score/<name>` of each source where there are several or
    a source pays another number than its score, and what stands beside them."""
    names = [source.name for source in sources]
    plain = len(sources) == 1 and not (sources[0].lower_bound or sources[0].length_penalty)
    return {
        f"score/{key}" if key in names else key: values
        for key, values in scores.items()
        if not (plain and key in names)
    }


@dataclass
class ScoreScale:
    """The mean and deviation that scores are normalised by: those of the first batch ("start"), or of all so far."""

    how: Literal["start", "running", "none"]
    moments_3: torch.Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    """What algorithm.mean_and_std reads; over all processes."""

    def normalize(self, scores: list[float], step: int) -> torch.Tensor:
        """The scores (R,) of a step's R answers, shifted and scaled; every process calls this."""
        scores_R = torch.tensor(scores, dtype=torch.float64)
        if self.how == "running" or (self.how == "start" and step == 0):
            self.moments_3 += processes.add_up(algorithm.moments(scores_R, torch.ones_like(scores_R)))
        mean, std = self.mean_and_std()
        return (scores_R - mean) / std

    def mean_and_std(self) -> tuple[float, float]:
        """Where all scores were alike there is no scale to learn, and theirs is kept."""
        if self.how == "none":
            return 0.0, 1.0
        mean, std = algorithm.mean_and_std(self.moments_3)
        return mean, std if std > 1e-3 * max(1.0, abs(mean)) else 1.0


def _ask_environments(environments: list[Any], **_: Any) -> list[float]:
    return [environment.get_reward() for environment in environments]


def conversation(tokenizer: PreTrainedTokenizerBase, one: Told) -> list[int]:
    """Prompt and answer as token ids, as a reward model reads them."""
    answer = copy.deepcopy(one.completion)
    for message in answer if isinstance(answer, list) else ():
        message["content"] = without_marks(tokenizer, message["content"])
        for call in message.get("tool_calls", ()):
            call["function"] = json.loads(without_marks(tokenizer, json.dumps(call["function"], ensure_ascii=False)))
    return render.conversation(tokenizer, {**one.row, "answer": answer}, "answer")


def _call(source: Source, told: Sequence[Told]) -> list[float]:
    """A function is called as TRL's GRPO calls it: lists by keyword, one for each column of the rows, and with an
    environment one of its instances, in the state in which the answers left them."""
    assert source.function is not None
    rows = copy.deepcopy([one.row for one in told])  # what it does to its arguments must not reach the data
    columns = {key: [row.get(key) for row in rows] for key in rows[0] if key not in ("prompt", "_place", "environment")}
    if any(one.world is not None for one in told):
        columns["environments"] = [one.world for one in told]
    prompts, completions = [row["prompt"] for row in rows], [copy.deepcopy(one.completion) for one in told]
    try:
        returned = source.function(prompts=prompts, completions=completions, **columns)
        values = None if isinstance(returned, str | bytes | dict | set) else list(returned)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the function is the user's program: it can fail in any way
        raise UserError(
            f"the reward function {source.name} raised {type(error).__name__}: {error}. It is called with the lists "
            f"{', '.join(['prompts', 'completions', *columns])} by keyword and must return one number for each answer."
        ) from error
    if values is None:
        raise UserError(f"the reward function {source.name} returned a {type(returned).__name__}: expected a list")
    if len(values) != len(rows):
        raise UserError(f"the reward function {source.name} returned {len(values)} values for {len(rows)} answers")
    numbers = []
    for one, value in zip(told, values, strict=True):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError, OverflowError, RuntimeError):
            numbers.append(math.nan)
        where = f"{value!r} for the prompt at {one.row['_place']} with the answer {one.text[:80]!r}"
        if not abs(numbers[-1]) < LARGEST:
            raise UserError(f"the reward function {source.name} returned {where}: expected a number below {LARGEST:g}")
        if source.truth and numbers[-1] not in (0, 1):
            raise UserError(
                f"the reward function {source.name} is declared the truth and returned {where}: truth is 0 or 1. "
                "Correct the function, or remove `truth: true`."
            )
    return numbers

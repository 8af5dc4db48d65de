"""What a person types becomes a desk: which stages answer which prompts, and where the votes go."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.contracts import PREFERENCE, PROMPT_ONLY, Row
from pipeline.data.load import DataSpec, read_source, read_split
from pipeline.data.prompts import find_prompts, prompt_key
from pipeline.data.votes import Candidate, Choose
from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.errors import UserError
from pipeline.evaluate.people import arena_of
from pipeline.label.desk import Desk
from pipeline.label.drawing import Drawer, Pair, Policy
from pipeline.language.say import say
from pipeline.recipe.recipe import Recipe
from pipeline.runs.dtype import settle
from pipeline.runs.rows import load_rows
from pipeline.stages.stage import BASE

if TYPE_CHECKING:
    from pipeline.evaluate.bench import Bench


@dataclass(frozen=True)
class Wishes:
    """How answers are drawn and shown, as a person has asked for it."""

    stages: list[str]
    temperatures: list[float]
    answers: int
    new_tokens: int
    choose: Choose
    share: float
    prompts: str
    gold: str
    arena: bool = False
    """Stages against each other on what tests hold out, to be rated."""
    judge: str = ""
    """The reward stage that votes before people do."""


def open_desk(recipe: Recipe, wishes: Wishes, runs: Path) -> Desk:
    """A desk whose drawer is not started yet.

    Raises UserError for a stage that gives no answers or is not finished, for prompts or votes that cannot be read,
    and where pairs are to be chosen by a reward model that the run does not have.
    """
    recipe = _trusting(recipe)
    if wishes.arena:
        _check_arena(wishes)
    stages = wishes.stages or _answering(recipe, runs)[-1:] or [BASE]
    adapters = {stage: _adapter(recipe, stage, runs) for stage in stages}
    if wishes.judge and not (wishes.judge in recipe.stages and _ranks(recipe, wishes.judge, runs)):
        raise UserError(
            f"--judge {wishes.judge} is neither a finished reward stage of {runs / recipe.name} nor an address such as "
            "http://127.0.0.1:8080/v1"
        )
    # In an arena nobody is told what the reward model prefers: it is rated against people.
    ranking = [name for name in recipe.order() if not wishes.arena and _ranks(recipe, name, runs)]
    reward = wishes.judge or (ranking[-1] if ranking else "")
    if wishes.choose != "random" and not reward:
        raise UserError(
            f"--choose {wishes.choose} asks a reward model, and {runs / recipe.name} has no finished one: train a "
            "reward stage, or leave --choose out"
        )
    width = max(wishes.answers, len(stages), len(wishes.temperatures))
    if len(stages) == 1 and wishes.temperatures == [0.0]:
        raise UserError("--temperature 0 gives one answer to each prompt, and a comparison needs two that differ")
    policies = [
        Policy(stage, adapters[stage], wishes.temperatures[place % len(wishes.temperatures)])
        for place in range(width)
        for stage in [stages[place % len(stages)]]
    ]
    told: list[str] = []
    if wishes.arena:
        prompts = _held_out_prompts(recipe, wishes.prompts)
    else:
        prompts, told = _prompts(recipe, stages[-1], wishes.prompts)
    folder = folder_of(recipe, wishes)
    drawer = Drawer(
        folder / ".drawn",
        policies,
        prompts,
        recipe.spec.seed,
        wishes.new_tokens,
        wishes.choose,
        partial(_load, recipe, stages, reward, runs),
        reward,
        wishes.arena,
    )
    return Desk(folder, drawer, _gold(wishes.gold), wishes.share, wishes.arena, [*told, *drawer.told])


def folder_of(recipe: Recipe, wishes: Wishes) -> Path:
    """Where the votes on a recipe's answers lie: beside it."""
    return arena_of(recipe) if wishes.arena else Path(recipe.file).parent / "labels"


def _trusting(recipe: Recipe) -> Recipe:
    """The recipe with every judge's votes taken: people who check a judge have to get at its pairs."""
    taken = {"judge_agreement": 0.0}
    stages = {
        name: section.model_copy(update={"data": section.data.model_copy(update=taken)})
        for name, section in recipe.stages.items()
    }
    return replace(recipe, spec=recipe.spec.model_copy(update={"stages": stages}))


def _check_arena(wishes: Wishes) -> None:
    if len(set(wishes.stages)) < max(2, len(wishes.stages)):
        raise UserError("--arena compares stages: name two or more, each once, for example: sft dpo ppo")
    asked = {
        "--answers": wishes.answers != 2,
        "--choose": wishes.choose != "random",
        "--temperature twice": len(wishes.temperatures) > 1,
    }
    for option in (option for option, given in asked.items() if given):
        raise UserError(
            f"{option} does not go with --arena: two stages answer each prompt, once each and alike, so that the "
            "ratings are of the stages. Leave it out"
        )


def _answering(recipe: Recipe, runs: Path) -> list[str]:
    return [name for name in recipe.order() if recipe.kind(name).answers and recipe.artifact(name, runs).manifest()]


def _ranks(recipe: Recipe, stage: str, runs: Path) -> bool:
    return recipe.kind(stage).ranks and recipe.artifact(stage, runs).manifest() is not None


def _adapter(recipe: Recipe, stage: str, runs: Path) -> str:
    """The sha256 of a stage's adapter; empty for the base."""
    if stage == BASE:
        return ""
    there = ", ".join([*_answering(recipe, runs), BASE])
    if stage in recipe.stages and not recipe.kind(stage).answers:
        raise UserError(f"'{stage}' writes no answers that could be compared (there is: {there})")
    if stage not in recipe.stages or recipe.artifact(stage, runs).manifest() is None:
        raise UserError(f"no finished stage '{stage}' in {runs / recipe.name} (there is: {there})")
    return recipe.artifact(stage, runs).verify().files[WEIGHTS]


def _prompts(recipe: Recipe, stage: str, file: str) -> tuple[list[Row], list[str]]:
    """Prompts to answer, each once, in an order made by the seed: those of a file; or those that a stage of the recipe
    samples from; or else the ones that `stage` has learnt from. What a test holds out is left out."""
    if file:
        rows: Iterable[Row] = read_source(file, PROMPT_ONLY, DataSpec(path=file)).rows
    else:
        sampling = [name for name in recipe.order() if recipe.kind(name).contract is PROMPT_ONLY]
        name = (sampling or [stage if stage in recipe.stages else recipe.order()[-1]])[0]
        rows = read_split(recipe.stages[name].data, PROMPT_ONLY, recipe.spec.seed).train
    by_key = {prompt_key(row): row for row in rows}
    held_out = set(_held_out(recipe))
    kept = [row for key, row in by_key.items() if key not in held_out]
    if not kept:
        raise UserError(
            f"{file or 'the recipe'} gives no prompt to label that no test holds out; name others with --prompts"
        )
    told = []
    if len(kept) < len(by_key):
        told.append(say("{n} prompts are not shown: a test holds them out", n=len(by_key) - len(kept)))
    random.Random(recipe.spec.seed).shuffle(kept)
    return kept, told


def _held_out_prompts(recipe: Recipe, file: str) -> list[Row]:
    """Prompts to rate stages on, each once, in an order made by the seed: those of a file, or those that the recipe's
    tests hold out."""
    if file:
        rows: list[Row] = list(read_source(file, PROMPT_ONLY, DataSpec(path=file)).rows)
    else:
        rows, held_out = [], set(_held_out(recipe))
        for name in (name for name in recipe.order() if not recipe.kind(name).every_token):
            split = read_split(recipe.stages[name].data, PROMPT_ONLY, recipe.spec.seed)
            asked = [*split.train, *(split.test or ()), *load_rows(recipe, name)[0].questions]
            rows += [row for row in asked if prompt_key(row) in held_out]
    kept = list({prompt_key(row): row for row in rows}.values())
    if not kept:
        raise UserError(
            "no test of the recipe holds out a prompt to rate stages on: give a stage `data.test` or `questions`, or "
            "name prompts with --prompts"
        )
    random.Random(recipe.spec.seed).shuffle(kept)
    return kept


def _held_out(recipe: Recipe) -> Iterator[str]:
    """What the stages are measured on, as far as it asks something."""
    for name in recipe.order():
        if not recipe.kind(name).every_token:
            rows, _ = load_rows(recipe, name)
            for row in [*(rows.test or ()), *rows.questions]:
                yield from find_prompts(row)


def _gold(file: str) -> list[Pair]:
    """Pairs whose better answer is known, from comparisons."""
    if not file:
        return []
    pairs = []
    for row in read_source(file, PREFERENCE, DataSpec(path=file)).rows:
        texts = [_said(row["chosen"]), _said(row["rejected"])]
        known = [Candidate(text=text, stage="gold", adapter="", seed=0, temperature=0.0) for text in texts]
        pairs.append(Pair(row["prompt"], known, gold=0))
    return pairs


def _said(answer: object) -> str:
    return str(answer[-1]["content"]) if isinstance(answer, list) else str(answer)


def _load(recipe: Recipe, stages: list[str], reward: str, runs: Path) -> Bench:
    from pipeline.evaluate.bench import Bench
    from pipeline.models.quiet import quiet

    quiet()
    asked = list(dict.fromkeys([stage for stage in [*stages, reward] if stage not in ("", BASE)]))
    artifacts = {name: Artifact(runs / recipe.name / name) for name in asked}
    model = settle(recipe.spec.model, {name: artifact.finished().dtype for name, artifact in artifacts.items()})
    folders = {name: artifact.adapter for name, artifact in artifacts.items()}
    rewards = {reward: folders.pop(reward)} if reward else {}
    return Bench(model, folders, rewards, 1.0)

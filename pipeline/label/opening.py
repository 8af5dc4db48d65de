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
    best_of: int = 1
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
    rankers = {name: recipe.artifact(name, runs).manifest() for name in recipe.order() if recipe.kind(name).ranks}
    finished = {name: manifest for name, manifest in rankers.items() if manifest}
    if wishes.judge and wishes.judge not in finished:
        raise UserError(
            f"--judge {wishes.judge} is neither a finished reward stage of {runs / recipe.name} nor an address such as "
            "http://127.0.0.1:8080/v1"
        )
    # In an arena nobody is told what the reward model prefers: it is rated against people.
    reward = wishes.judge or ("" if wishes.arena else next(reversed(finished), ""))
    asked = f"--choose {wishes.choose}" if wishes.choose != "random" else ""
    asked = f"--best-of {wishes.best_of}" if wishes.best_of > 1 else asked
    if asked and not reward:
        raise UserError(
            f"{asked} asks a reward model, and {runs / recipe.name} has no finished one: train a reward stage, or "
            f"leave {asked.split()[0]} out"
        )
    if wishes.best_of > 1 and 0.0 in wishes.temperatures:
        raise UserError(f"{asked} draws several answers, and at --temperature 0 all would be alike: raise it")
    if wishes.choose == "disagree" and not finished[reward].head_means:
        raise UserError(
            f"--choose disagree compares the heads of a reward model, and '{reward}' has one: write `heads: 4` into "
            f"stages.{reward} and run it again, or use --choose uncertain"
        )
    width = max(wishes.answers, len(stages), len(wishes.temperatures))
    if len(stages) == 1 and wishes.temperatures == [0.0]:
        raise UserError("--temperature 0 gives one answer to each prompt, and a comparison needs two that differ")
    policies = [
        Policy(stage, adapters[stage], wishes.temperatures[place % len(wishes.temperatures)], wishes.best_of)
        for place in range(width)
        for stage in [stages[place % len(stages)]]
    ]
    if wishes.arena:
        prompts, told = _held_out_prompts(recipe, wishes.prompts)
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
        recipe.artifact(reward, runs).verify().files[WEIGHTS] if asked or wishes.judge else "",
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
        "--best-of": wishes.best_of > 1,
        "--temperature twice": len(wishes.temperatures) > 1,
    }
    for option in (option for option, given in asked.items() if given):
        raise UserError(
            f"{option} does not go with --arena: two stages answer each prompt, once each and alike, so that the "
            "ratings are of the stages. Leave it out"
        )


def _answering(recipe: Recipe, runs: Path) -> list[str]:
    """Those of its finished stages whose answers the page can show."""
    return [
        name
        for name in recipe.order()
        if recipe.kind(name).answers and not recipe.stages[name].asked_with() and recipe.artifact(name, runs).manifest()
    ]


def _adapter(recipe: Recipe, stage: str, runs: Path) -> str:
    """The sha256 of a stage's adapter; empty for the base."""
    if stage == BASE:
        return ""
    there = ", ".join([*_answering(recipe, runs), BASE])
    if stage in recipe.stages and not recipe.kind(stage).answers:
        raise UserError(f"'{stage}' writes no answers that could be compared (there is: {there})")
    if stage in recipe.stages and (tools := recipe.stages[stage].asked_with()):
        # Tools stop a slow call by a signal, which comes in the main thread only, and a vote holds one text an answer.
        raise UserError(
            f"'{stage}' answers with the tools of {tools}, and the page draws answers without tools (there is: {there})"
        )
    if stage not in recipe.stages or recipe.artifact(stage, runs).manifest() is None:
        raise UserError(f"no finished stage '{stage}' in {runs / recipe.name} (there is: {there})")
    return recipe.artifact(stage, runs).verify().files[WEIGHTS]


def _prompts(recipe: Recipe, stage: str, file: str) -> tuple[list[Row], list[str]]:
    """Prompts to answer, each once, in an order made by the seed: those of a file; or those that a stage of the recipe
    samples from; or else the ones that `stage` has learnt from. What a test holds out is left out."""
    if file:
        rows: Iterable[Row] = read_source(file, PROMPT_ONLY, DataSpec(path=file)).rows
    else:
        sampling = [
            name
            for name in recipe.order()
            if recipe.kind(name).contract is PROMPT_ONLY and not recipe.stages[name].asked_with()
        ]
        name = (sampling or [stage if stage in recipe.stages else recipe.order()[-1]])[0]
        rows = read_split(recipe.stages[name].data, PROMPT_ONLY, recipe.spec.seed).train
    by_key = {prompt_key(row): row for row in rows}
    held_out = set(_held_out(recipe))
    seen = [row for key, row in by_key.items() if key not in held_out]
    kept = [row for row in seen if not row.get("tools")]
    if not kept:
        raise UserError(
            f"{file or 'the recipe'} gives no prompt to label that no test holds out and that names no tools; name "
            "others with --prompts"
        )
    told = []
    if len(seen) < len(by_key):
        told.append(say("{n} prompts are not shown: a test holds them out", n=len(by_key) - len(seen)))
    told += _tell_of_tools(len(seen) - len(kept))
    random.Random(recipe.spec.seed).shuffle(kept)
    return kept, told


def _held_out_prompts(recipe: Recipe, file: str) -> tuple[list[Row], list[str]]:
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
    seen = list({prompt_key(row): row for row in rows}.values())
    kept = [row for row in seen if not row.get("tools")]
    if not kept:
        raise UserError(
            "no test of the recipe holds out a prompt to rate stages on: give a stage `data.test` or `questions`, or "
            "name prompts with --prompts"
        )
    random.Random(recipe.spec.seed).shuffle(kept)
    return kept, _tell_of_tools(len(seen) - len(kept))


def _tell_of_tools(n: int) -> list[str]:
    return [say("{n} prompts are not shown: they name tools", n=n)] if n else []


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

"""What a person types becomes a desk: which stages answer which prompts, and where the votes go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.contracts import PREFERENCE
from pipeline.data.load import DataSpec, read_source
from pipeline.data.votes import Candidate, Choose, of_round
from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.errors import UserError
from pipeline.evaluate.people import arena_of
from pipeline.label.desk import Desk
from pipeline.label.drawing import Drawer, Pair, Policy
from pipeline.label.prompts import held_out_prompts, training_prompts
from pipeline.language.say import say_again
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.rounds import LABELS
from pipeline.recipe.waiting import counter, current, folders, policy
from pipeline.runs.dtype import settle
from pipeline.runs.states import states
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
    now = None if wishes.arena else current(recipe)
    stages = wishes.stages or ([_policy(recipe, now.number, runs)] if now else _answering(recipe, runs)[-1:]) or [BASE]
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
            f"stages.{recipe.written.get(reward, reward)} and run it again, or use --choose uncertain"
        )
    width = max(wishes.answers, len(stages), len(wishes.temperatures))
    if len(stages) == 1 and wishes.temperatures == [0.0]:
        raise UserError("--temperature 0 gives one answer to each prompt, and a comparison needs two that differ")
    policies = [
        Policy(stage, adapters[stage], wishes.temperatures[place % len(wishes.temperatures)], wishes.best_of)
        for place in range(width)
        for stage in [stages[place % len(stages)]]
    ]
    folder = folder_of(recipe, wishes)
    earlier = [before for n in range(1, now.number) if (before := of_round(folder.parent, n)).is_dir()] if now else []
    if wishes.arena:
        prompts, told = held_out_prompts(recipe, wishes.prompts)
    else:
        prompts, told = training_prompts(recipe, stages[-1], wishes.prompts, earlier)
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
    told = [*([say_again(now.told)] if now else []), *told, *drawer.told]
    count = counter(recipe, now.number, folder) if now else None
    return Desk(folder, drawer, _gold(wishes.gold), wishes.share, wishes.arena, told, count, earlier)


def folder_of(recipe: Recipe, wishes: Wishes) -> Path:
    return arena_of(recipe) if wishes.arena else labels_of(recipe)


def labels_of(recipe: Recipe) -> Path:
    """Where the votes on a recipe's answers lie: beside it; those of a round where its stages read them.

    Raises UserError where every round has its votes."""
    if recipe.spec.rounds is None:
        return Path(recipe.file).parent / LABELS
    now = current(recipe)
    if now is None:
        raise UserError(
            f"every round of {recipe.file} has its labels. Go on with `onebase run {recipe.file}`, or ask for more "
            "rounds: raise rounds in the recipe"
        )
    return of_round(folders(recipe)[0], now.number)


def _policy(recipe: Recipe, number: int, runs: Path) -> str:
    """The stage that a round's answers are drawn from. Raises UserError if it is not up to date."""
    name = policy(recipe, number)
    state = next((state for state in states(recipe, runs) if state.name == name), None)
    if state and not state.fresh:
        raise UserError(
            f"the answers of round {number} are those of '{name}', which is {state.word} ({state.why}). First type: "
            f"onebase run {recipe.file}"
        )
    return name


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

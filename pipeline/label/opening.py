"""What a person types becomes a desk: which stages answer which prompts, and where the votes go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.contracts import PREFERENCE, PROMPT_ONLY, QUESTION, Row
from pipeline.data.load import DataSpec, read_source, read_split
from pipeline.data.prompts import find_prompts, prompt_key
from pipeline.data.votes import Candidate, Choose, of_round, read_votes
from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.errors import UserError
from pipeline.label.desk import Desk
from pipeline.label.drawing import Drawer, Pair, Policy
from pipeline.language.say import say, say_again
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.rounds import LABELS, read_by
from pipeline.recipe.sections import ancestors
from pipeline.recipe.waiting import current, folders, policy, progress, waiting
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


def open_desk(recipe: Recipe, wishes: Wishes, runs: Path) -> Desk:
    """A desk whose drawer is not started yet.

    Raises UserError for a stage that gives no answers or is not finished, for prompts or votes that cannot be read,
    and where pairs are to be chosen by a reward model that the run does not have.
    """
    now = current(recipe)
    stages = wishes.stages or ([_policy(recipe, now.number, runs)] if now else _answering(recipe, runs)[-1:]) or [BASE]
    adapters = {stage: _adapter(recipe, stage, runs) for stage in stages}
    rankers = {name: recipe.artifact(name, runs).manifest() for name in recipe.order() if recipe.kind(name).ranks}
    finished = {name: manifest for name, manifest in rankers.items() if manifest}
    reward = next(reversed(finished), "")
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
    folder = labels_of(recipe)
    earlier = [before for n in range(1, now.number) if (before := of_round(folder.parent, n)).is_dir()] if now else []
    prompts, told = _prompts(recipe, stages[-1], wishes.prompts, earlier)
    drawer = Drawer(
        folder / ".drawn",
        policies,
        prompts,
        recipe.spec.seed,
        wishes.new_tokens,
        wishes.choose,
        partial(_load, recipe, stages, reward, runs),
        reward,
        recipe.artifact(reward, runs).verify().files[WEIGHTS] if asked else "",
    )
    told = [*([say_again(now.told)] if now else []), *told, *drawer.told]
    count = partial(progress, recipe, now.number) if now else None
    return Desk(folder, drawer, _gold(wishes.gold), wishes.share, told, count, earlier)


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


def _prompts(recipe: Recipe, stage: str, file: str, earlier: list[Path]) -> tuple[list[Row], list[str]]:
    """Prompts to answer, each once, in an order made by the seed: those of a file; or those that a stage of the recipe
    samples from; or else the ones that `stage` has learnt from, or a stage that it comes from where `stage` has learnt
    from votes. What a test holds out is left out. What was labelled in the `earlier` rounds comes last."""
    if file:
        rows: Iterable[Row] = read_source(file, PROMPT_ONLY, DataSpec(path=file)).rows
    else:
        of_stage = [stage, *ancestors(recipe.stages, stage)] if stage in recipe.stages else recipe.order()[::-1]
        sampling = [
            name
            for name in recipe.order()
            if recipe.kind(name).contract is PROMPT_ONLY and not recipe.stages[name].asked_with()
        ]
        asked = [name for name in [*sampling, *of_stage] if not read_by(recipe.stages[name])][:1]
        # A round's stages leave prompts out of training that its votes hold out: these are asked all the same.
        data = [recipe.stages[name].data.model_copy(update={"apart": None}) for name in asked]
        rows = [row for of in data for row in read_split(of, PROMPT_ONLY, recipe.spec.seed).train]
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
    if len(kept) < len(seen):
        told.append(say("{n} prompts are not shown: they name tools", n=len(seen) - len(kept)))
    import random

    random.Random(recipe.spec.seed).shuffle(kept)
    labelled = {prompt_key({"prompt": vote.prompt}) for folder in earlier for vote in read_votes(folder)[0]}
    return sorted(kept, key=lambda row: prompt_key(row) in labelled), told


def _held_out(recipe: Recipe) -> Iterator[str]:
    """What the stages are measured on, as far as it asks something."""
    lacking = waiting(recipe)
    for name in (name for name in recipe.order() if not recipe.kind(name).every_token):
        section, contract = recipe.stages[name], recipe.kind(name).contract
        recipe.check_files(name)
        tests: list[Row] = []
        if not (name in lacking and read_by(section)):
            tests += read_split(section.data, contract, recipe.spec.seed).test or ()
        elif isinstance(section.data.test, str):  # the votes that it waits for hold out nothing yet
            tests += read_source(section.data.test, contract, section.data).rows
        if file := section.question_file():
            tests += read_source(file, QUESTION, DataSpec(path=file, encoding=section.data.encoding)).rows
        for row in tests:
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

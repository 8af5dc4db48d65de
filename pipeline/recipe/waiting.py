"""How far people are with the votes of each round, and which stages wait for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from pipeline.data.voted import teaches
from pipeline.data.votes import Vote, of_round, read_votes
from pipeline.language.say import kept
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.rounds import read_by
from pipeline.stages.stage import BASE


@dataclass(frozen=True)
class Progress:
    """How far people are with a round."""

    number: int
    count: int
    labels: int
    votes: int
    untaught: list[str]
    """Stages of the round that no vote teaches anything so far."""

    @property
    def full(self) -> bool:
        return self.labels >= self.votes and not self.untaught

    @property
    def told(self) -> str:
        values = {"round": self.number, "count": self.count, "labels": self.labels, "votes": self.votes}
        if self.labels < self.votes or not self.untaught:
            return kept("round {round} of {count}: {labels} of {votes} labels", **values)
        return kept(
            "round {round} of {count}: {labels} of {votes} labels, and none teaches {stages}",
            **values, stages=", ".join(self.untaught),
        )  # fmt: skip


def progress(recipe: Recipe, number: int) -> Progress:
    """How far people are with a round; a judge's votes are no labels of theirs. Raises UserError naming file and line
    of what is no vote."""
    return _count(recipe, number, _votes(recipe, number, other_than=None))


def counter(recipe: Recipe, number: int, folder: Path) -> Callable[[Iterable[Vote]], Progress]:
    """The same, given the votes that stand in this folder, which is one of the round's. All others are read now: who
    counts after each vote does not read thousands of them anew."""
    others = _votes(recipe, number, other_than=folder)
    return lambda votes: _count(recipe, number, chain(others, ((number, vote) for vote in votes)))


def _votes(recipe: Recipe, number: int, other_than: Path | None) -> list[tuple[int, Vote]]:
    """Those of the rounds 1 to this one, each with its round."""
    every = [(n, of_round(path, n)) for n in range(1, number + 1) for path in folders(recipe)]
    there = [(n, folder) for n, folder in every if folder.is_dir() and folder != other_than]
    return [(n, vote) for n, folder in there for vote in read_votes(folder)[0]]


def _count(recipe: Recipe, number: int, votes: Iterable[tuple[int, Vote]]) -> Progress:
    rounds = recipe.spec.rounds
    assert rounds is not None, "the recipe has rounds"
    kinds = {name: recipe.kind(name).contract.kind for name in recipe.order() if read_by(recipe.stages[name]) == number}
    labels, taught = 0, set[str]()
    for n, vote in votes:
        learns = {name for name, kind in kinds.items() if teaches(vote, kind)}
        taught |= learns
        labels += bool(learns) and n == number and not vote.judge
    return Progress(number, rounds.count, labels, rounds.votes, [name for name in kinds if name not in taught])


def folders(recipe: Recipe) -> list[Path]:
    """The folders in which the rounds' votes lie: one, unless the recipe names several."""
    parts = [part for section in recipe.stages.values() for part in section.data.parts() if part.rounds]
    return list(dict.fromkeys(Path(os.path.normpath(part.path)) for part in parts))


def waiting(recipe: Recipe) -> dict[str, Progress]:
    """The stages that wait for the votes of people, each with the first round that lacks some."""
    known: dict[int, Progress] = {}
    found = {}
    for name in recipe.order():
        for number in range(1, recipe.round_of(name) + 1):
            if number not in known:
                known[number] = progress(recipe, number)
            if not known[number].full:
                found[name] = known[number]
                break
    return found


def current(recipe: Recipe) -> Progress | None:
    """The first round that lacks votes; None where all have theirs, or the recipe has no rounds."""
    count = recipe.spec.rounds.count if recipe.spec.rounds else 0
    return next((one for n in range(1, count + 1) if not (one := progress(recipe, n)).full), None)


def policy(recipe: Recipe, number: int) -> str:
    """The stage whose answers people read in a round: the last of the round before that answers; in the first round,
    and where no stage of a round answers, what its stages continue."""
    before = [name for name in recipe.order() if recipe.round_of(name) == number - 1 and recipe.kind(name).answers]
    if number > 1 and before:
        return before[-1]
    own = [name for name in recipe.order() if recipe.round_of(name) == 1]
    first = next((name for name in own if recipe.kind(name).answers), own[0])
    return recipe.stages[first].from_ or BASE

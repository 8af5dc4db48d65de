"""What people say of anonymous stages side by side (onebase label --arena): how strong that makes each of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path

import numpy

from pipeline.data.prompts import prompt_key
from pipeline.data.votes import SKIP, Vote, read_votes
from pipeline.disk.atomic import digest
from pipeline.errors import UserError
from pipeline.evaluate.stored import Arena, People, Results
from pipeline.evaluate.wording import FEW, PEOPLE, judged_by
from pipeline.language.say import say
from pipeline.measure.krippendorff import krippendorff
from pipeline.measure.metric import ELO, Estimate
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.rounds import ARENA

MADE_OF = "arena"
"""The name under which results.json notes which votes it counts."""


def arena_of(recipe: Recipe) -> Path:
    """Where the votes on stages lie: beside the recipe, and not below `labels/`, which stages are trained on."""
    return Path(recipe.file).parent / ARENA


def read_arena(folder: Path) -> tuple[list[Vote], list[str]]:
    """The votes that compare two stages, none on a known answer and none that was skipped; and what there is to tell of
    the files.

    Raises UserError for a line that is no vote, or that compares something else.
    """
    if not folder.is_dir():
        return [], []
    standing, told = read_votes(folder)
    votes = [vote for vote in standing if vote.gold is None and vote.choice != SKIP]
    for vote in votes:
        if len({candidate.stage for candidate in vote.candidates}) != 2 or len(vote.candidates) != 2:
            raise UserError(
                f"{folder}: the vote {vote.id} of {vote.annotator} is not between two stages, so it rates none. "
                "Votes of `onebase label` without --arena belong into labels/: move them there"
            )
    return votes, told


def fingerprint(votes: list[Vote]) -> str:
    return digest(sorted([vote.id, vote.choice] for vote in votes)) if votes else ""


def rate(votes: list[Vote], adapters: Mapping[str, str]) -> tuple[People, Arena | None]:
    """Who voted; and the stages' ratings, None where no vote is on those that are there.

    adapters: the sha256 of every stage's adapter as it is now; of the base "".

    Equally good and both bad are half a point for each. Votes on one prompt are drawn together for the intervals.
    There are win rates and no ratings where the prompts are few, or where two stages were never compared, not even by
    way of others.
    """
    from scipy.sparse.csgraph import connected_components  # takes a second to import

    from pipeline.evaluate.arena import Played

    now = [vote for vote in votes if all(adapters.get(one.stage) == one.adapter for one in vote.candidates)]
    stood = Counter(one.stage for vote in now for one in vote.candidates)
    units: dict[str, list[str]] = defaultdict(list)
    for vote in now:
        units[vote.pair].append(vote.named(vote.choice))
    people = People(
        votes={name: stood[name] for name in adapters if stood[name]},
        prompts=len({_asked(vote) for vote in now}),
        people=len({vote.annotator for vote in now}),
        earlier=len(votes) - len(now),
        agreement=krippendorff(units.values(), "nominal"),
    )
    if not now:
        return people, None
    names = list(people.votes)
    prompts = {key: place for place, key in enumerate(dict.fromkeys(map(_asked, now)))}
    points_PKK = numpy.zeros((len(prompts), len(names), len(names)))
    for vote in now:
        p, (a, b) = prompts[_asked(vote)], (names.index(one.stage) for one in vote.candidates)
        won = 0.5 if isinstance(vote.choice, str) else 1.0 - vote.choice
        points_PKK[p, a, b] += won
        points_PKK[p, b, a] += 1 - won
    played = Played(names, points_PKK)
    groups, _ = connected_components(points_PKK.sum(0) + points_PKK.sum(0).T, directed=False)
    elo = played.elo() if groups == 1 and len(prompts) >= FEW else {}
    return people, Arena(names=names, elo=elo, wins=played.wins())


def _asked(vote: Vote) -> str:
    return prompt_key({"prompt": vote.prompt})


def ratings(results: Results) -> tuple[list[str], list[list[str]]]:
    """The stages' ratings by people beside those by every other judge: the columns of a table and its rows."""
    assert results.people is not None
    judges = {judge: arena for judge, arena in results.arenas.items() if arena.elo}
    columns = [say("stage"), say("votes"), *(_heading(judge) for judge in judges)]
    rows = [
        [name, str(count), *(ELO.shown(arena.elo[name]) if name in arena.elo else "" for arena in judges.values())]
        for name, count in results.people.votes.items()
    ]
    return columns, rows


def _heading(judge: str) -> str:
    by = judged_by(judge)
    return by[0].upper() + by[1:]


def tell(results: Results) -> list[str]:
    """How many votes there are, how far people agree, and where another judge puts two stages the other way round."""
    people = results.people
    if people is None:
        return []
    told = []
    if people.votes:
        count = sum(people.votes.values()) // 2
        told.append(
            say(
                "{n} votes by {people} people. Equally good and both bad are half a point for each.",
                n=count, people=people.people,
            )
        )  # fmt: skip
    if alpha := people.agreement:
        value, low, high = (f"{number:.2f}" for number in (alpha.value, alpha.low, alpha.high))
        told.append(
            say(
                "People agree on {n} pairs that several saw with an alpha of {value}, 95 % {low} to {high}.",
                n=alpha.n, value=value, low=low, high=high,
            )
        )  # fmt: skip
    if people.earlier:
        told.append(say("{n} votes are on answers of an earlier adapter and do not count.", n=people.earlier))
    arena = results.arenas.get(PEOPLE)
    if arena and people.prompts < FEW:
        told.append(say("No ratings yet: {n} prompts have votes, and {few} are needed.", n=people.prompts, few=FEW))
    elif arena and not arena.elo:
        told.append(say("No ratings: some of these stages were never compared, not even by way of others."))
    return told + _disputed(results)


def _disputed(results: Results) -> list[str]:
    """Where people rate one stage above another and a judge the other above the one, each beyond its intervals."""
    arenas = dict(results.arenas)
    people = arenas.pop(PEOPLE, None)
    return [
        say("People put {a} above {b}; {by} it is the other way round.", a=a, b=b, by=judged_by(judge))
        for judge, arena in arenas.items()
        for a, b in permutations(people.elo if people else (), 2)
        if people and _above(people.elo, a, b) and _above(arena.elo, b, a)
    ]


def _above(elo: Mapping[str, Estimate], a: str, b: str) -> bool:
    """Whether two ratings have intervals that exclude each other, and a's is the higher."""
    if a not in elo or b not in elo:
        return False
    low, high = elo[a].low, elo[b].high
    return low is not None and high is not None and low > high

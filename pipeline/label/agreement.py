"""How far votes can be trusted: whether people agree with each other, with known answers and with themselves; whether
they follow the side of the screen or the length."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from pipeline.data import judged
from pipeline.data.votes import BOTH_BAD, SKIP, TIE, Vote
from pipeline.disk.atomic import Json, digest
from pipeline.language.say import say
from pipeline.measure import intervals
from pipeline.measure.krippendorff import krippendorff


def weigh(votes: Sequence[Vote]) -> Json:
    """The figures of some votes that stand. Of several votes of one person on one pair the last counts. Those of judges
    count in `judges` alone: how often they agree with people.

    An estimate is {value, low, high, n, how}, or None where there is too little to tell.
    """
    judges = _weigh_judges(votes)
    votes = [vote for vote in votes if not vote.judge]
    last = list({(vote.annotator, vote.pair): vote for vote in votes}.values())
    trained = [vote for vote in last if vote.gold is None]
    known = [vote for vote in last if vote.gold is not None and vote.choice != SKIP]
    people = sorted({vote.annotator for vote in last})
    guidelines = sorted({name for vote in trained for name in vote.guidelines or {}})
    alphas = {"choice": krippendorff(_units(trained, _choice), "nominal")}
    alphas["strength"] = krippendorff(_units(trained, lambda vote: vote.strength), "ordinal")
    for name in guidelines:
        alphas[name] = krippendorff(_units(trained, lambda vote, name=name: _by(vote, name)), "nominal")
    decided = [vote for vote in trained if len(vote.candidates) == 2 and isinstance(vote.choice, int)]
    longer: dict[str, list[float]] = defaultdict(list)
    for vote in decided:
        first, second = (len(candidate.text) for candidate in vote.candidates)
        if first != second:
            longer[vote.pair].append(float(vote.choice == (second > first)))
    left = [vote.choice == vote.shown[0] for vote in decided if vote.shown]
    gold = {name: [v.choice == v.gold for v in known if v.annotator == name] for name in people}
    return {
        "votes": len(votes),
        "people": {name: sum(vote.annotator == name for vote in votes) for name in people},
        "pairs": len({vote.pair for vote in trained}),
        "pairs_of_several": sum(len(values) > 1 for values in _units(trained, _choice)),
        "alpha": {name: asdict(found) if found else None for name, found in alphas.items()},
        "gold": {name: asdict(intervals.proportion(right)) for name, right in gold.items() if right},
        "left": asdict(intervals.proportion(left)) if left else None,
        "longer": asdict(intervals.share([statistics.mean(each) for each in longer.values()])) if longer else None,
        "triads": _triads(decided),
        "per_hour": {name: _pace([v for v in votes if v.annotator == name]) for name in people},
        "judges": judges,
    }


def _weigh_judges(votes: Sequence[Vote]) -> Json:
    """By judge: its votes; the share of pairs decided by both on which it agrees with people; and alpha of it and of
    what most people said, in which a tie and both bad are one answer of three."""
    people, found = judged.by_people(votes), {}
    for name, same in judged.checked(votes).items():
        own = [vote for vote in votes if vote.judge and vote.annotator == name]
        units = [
            [TIE if said == BOTH_BAD else said for said in (_choice(vote), people[vote.pair])]
            for vote in own
            if vote.pair in people
        ]
        alpha = krippendorff(units, "nominal")
        share = asdict(intervals.proportion(same)) if same else None
        found[name] = {"votes": len(own), "share": share, "alpha": asdict(alpha) if alpha else None}
    return found


def _units(votes: Iterable[Vote], value: Any) -> list[list[Hashable]]:
    """What people said of each pair; a vote that says nothing of it is left out."""
    units: dict[str, list[Hashable]] = defaultdict(list)
    for vote in votes:
        if vote.choice != SKIP and (given := value(vote)) is not None:
            units[vote.pair].append(given)
    return list(units.values())


def _choice(vote: Vote) -> str:
    return vote.named(vote.choice)


def _by(vote: Vote, guideline: str) -> str | None:
    given = (vote.guidelines or {}).get(guideline)
    return None if given is None else vote.named(given)


def _triads(votes: Iterable[Vote]) -> Json:
    """Three answers to a prompt that one person has compared two by two, and those of them that contradict themselves:
    A before B, B before C, C before A. Votes by chance do in one of four."""
    better: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    for vote in votes:
        texts = [candidate.text for candidate in vote.candidates]
        winner, loser = texts[int(vote.choice)], texts[1 - int(vote.choice)]
        if winner != loser:
            better[vote.annotator, digest(vote.prompt)].add((winner, loser))
    whole = contradictory = 0
    for pairs in better.values():
        for three in combinations(sorted({text for pair in pairs for text in pair}), 3):
            wins = [sum((one, other) in pairs for other in three) for one in three]
            if sum(wins) == 3:
                whole += 1
                contradictory += wins == [1, 1, 1]
    return {"whole": whole, "contradictory": contradictory}


def _pace(votes: Sequence[Vote]) -> float | None:
    """Votes an hour, by the median vote, so that a break does not count."""
    seconds = statistics.median(vote.seconds for vote in votes)
    return 3600 / seconds if seconds > 0 else None


def tell(found: Json) -> list[tuple[str, str]]:
    """The figures as lines for a person: a heading and a sentence."""
    people = say(", ").join(f"{name} {count}" for name, count in found["people"].items())
    lines = [(say("votes"), say("{n} by {people}", n=found["votes"], people=people))] if people else []
    told = say(
        "{n} of {pairs} pairs were seen by several people (alpha is 1 for full agreement, 0 for chance)",
        n=found["pairs_of_several"], pairs=found["pairs"],
    )  # fmt: skip
    if people:
        lines.append((say("agreement"), told))
    for name, alpha in found["alpha"].items():
        what = say("choice") if name == "choice" else say("strength") if name == "strength" else name
        if alpha:
            told = say("alpha {value}, 95 % {low} to {high}, {n} pairs", **_written(alpha, "{:.2f}"), n=alpha["n"])
            lines.append((say("agreement on {what}", what=what), told))
    for name, judge in found["judges"].items():
        told = say("{n} votes", n=judge["votes"])
        if share := judge["share"]:
            agrees = say(
                "agrees with people on {value} of {n} pairs that both decided, 95 % {low} to {high}",
                **_written(share, "{:.0%}"), n=share["n"],
            )  # fmt: skip
            told = say(", ").join([told, agrees])
        if alpha := judge["alpha"]:
            value = say("alpha {value}, 95 % {low} to {high}, {n} pairs", **_written(alpha, "{:.2f}"), n=alpha["n"])
            told = say(", ").join([told, value])
        lines.append((say("judge"), say("{name}: {told}", name=name, told=told)))
    for name, right in found["gold"].items():
        told = say(
            "{name} chose the known better answer in {value} of {n}, 95 % {low} to {high}",
            **_written(right, "{:.0%}"), name=name, n=right["n"],
        )  # fmt: skip
        lines.append((say("known answers"), told))
    if left := found["left"]:
        told = say("left answer chosen {value}, 95 % {low} to {high}", **_written(left, "{:.0%}"))
        lines.append((say("side"), told))
    if longer := found["longer"]:
        told = say("longer answer chosen {value}, 95 % {low} to {high}", **_written(longer, "{:.0%}"))
        lines.append((say("length"), told))
    if triads := found["triads"]["whole"]:
        told = say(
            "{n} of {triads} times one person put three answers in a circle; by chance it is one of four",
            n=found["triads"]["contradictory"], triads=triads,
        )  # fmt: skip
        lines.append((say("contradictions"), told))
    paces = {name: pace for name, pace in found["per_hour"].items() if pace}
    if paces:
        lines.append((say("votes an hour"), say(", ").join(f"{name} {pace:.0f}" for name, pace in paces.items())))
    return lines


def _written(estimate: Json, form: str) -> dict[str, str]:
    return {key: form.format(estimate[key]) for key in ("value", "low", "high")}

"""How far votes can be trusted: whether people agree with each other, with known answers and with themselves; whether
they follow the side of the screen or the length."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any, Literal

import numpy

from pipeline.data.votes import SKIP, Vote
from pipeline.disk.atomic import Json, digest
from pipeline.language.say import say
from pipeline.measure import intervals
from pipeline.measure.metric import Estimate

Level = Literal["nominal", "ordinal"]
OVER_PAIRS = "bootstrap over pairs"


def krippendorff(units: Iterable[Sequence[Any]], level: Level) -> Estimate | None:
    """Krippendorff's alpha with its bootstrap interval over units: 1 is full agreement, 0 is that of chance.

    units: for each, the values that several people gave it; where fewer than two did, it does not count. None where
    fewer than two units are left, or all values are equal, so that nothing tells agreement from chance.

    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".
    """
    kept = [list(values) for values in units if len(values) > 1]
    names = sorted({value for values in kept for value in values})
    if len(kept) < 2 or len(names) < 2:
        return None
    places = {name: place for place, name in enumerate(names)}
    counts_UV = numpy.zeros((len(kept), len(names)))
    for unit, values in enumerate(kept):
        for value in values:
            counts_UV[unit, places[value]] += 1
    rng = numpy.random.default_rng(intervals.SEED)
    drawn_BU = rng.multinomial(len(kept), numpy.full(len(kept), 1 / len(kept)), intervals.RESAMPLES)
    observed_B, expected_B, largest_B = _disagreement(counts_UV, numpy.vstack([numpy.ones(len(kept)), drawn_BU]), level)
    # A draw whose values are all equal tells nothing.
    alpha_B = 1 - observed_B / numpy.where(expected_B > 0, expected_B, numpy.nan)
    low, high = numpy.nanpercentile(alpha_B[1:], [2.5, 97.5])
    if observed_B[0] == 0:  # a bootstrap would be certain; there may be as many unequal pairs as so few can miss
        missed = 1 - (intervals.share([1.0] * len(kept)).low or 0.0)
        low = 1 - missed * largest_B[0] / expected_B[0]
    return Estimate(float(alpha_B[0]), float(low), float(high), len(kept), OVER_PAIRS)


def _disagreement(counts_UV: Any, weights_BU: Any, level: Level) -> tuple[Any, Any, Any]:
    """For each weighting of the units (B,): observed, expected by chance, and the largest that two values can have."""
    others_U = counts_UV.sum(1) - 1
    alike_UVV = numpy.eye(counts_UV.shape[1]) * counts_UV[:, :, None]  # a value is not paired with itself
    pairs_UVV = (counts_UV[:, :, None] * counts_UV[:, None, :] - alike_UVV) / others_U[:, None, None]
    coincidences_BVV = numpy.einsum("bu,uvw->bvw", weights_BU, pairs_UVV)
    totals_BV = coincidences_BVV.sum(2)
    n_B = totals_BV.sum(1)
    if level == "nominal":
        distance_BVV = numpy.broadcast_to(1 - numpy.eye(counts_UV.shape[1]), coincidences_BVV.shape)
    else:
        middle_BV = totals_BV.cumsum(1) - totals_BV / 2  # between two values lie all others, and half of both
        distance_BVV = (middle_BV[:, :, None] - middle_BV[:, None, :]) ** 2
    observed_B = (coincidences_BVV * distance_BVV).sum((1, 2)) / n_B
    expected_B = (totals_BV[:, :, None] * totals_BV[:, None, :] * distance_BVV).sum((1, 2)) / (n_B * (n_B - 1))
    return observed_B, expected_B, distance_BVV.max((1, 2))


def weigh(votes: Sequence[Vote]) -> Json:
    """The figures of some votes that stand. Of several votes of one person on one pair the last counts.

    An estimate is {value, low, high, n, how}, or None where there is too little to tell.
    """
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
    }


def _units(votes: Iterable[Vote], value: Any) -> list[list[Hashable]]:
    """What people said of each pair; a vote that says nothing of it is left out."""
    units: dict[str, list[Hashable]] = defaultdict(list)
    for vote in votes:
        if vote.choice != SKIP and (given := value(vote)) is not None:
            units[vote.pair].append(given)
    return list(units.values())


def _choice(vote: Vote) -> str:
    return _text(vote, vote.choice)


def _by(vote: Vote, guideline: str) -> str | None:
    given = (vote.guidelines or {}).get(guideline)
    return None if given is None else _text(vote, given)


def _text(vote: Vote, given: int | str) -> str:
    """The same for everybody, though their lines may name the answers in another order: the place of the text that was
    chosen among the texts in the order of the alphabet."""
    texts = [candidate.text for candidate in vote.candidates]
    return given if isinstance(given, str) else str(sorted(texts).index(texts[given]))


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
    lines = [(say("votes"), say("{n} by {people}", n=found["votes"], people=people))]
    told = say(
        "{n} of {pairs} pairs were seen by several people (alpha is 1 for full agreement, 0 for chance)",
        n=found["pairs_of_several"], pairs=found["pairs"],
    )  # fmt: skip
    lines.append((say("agreement"), told))
    for name, alpha in found["alpha"].items():
        what = say("choice") if name == "choice" else say("strength") if name == "strength" else name
        if alpha:
            told = say("alpha {value}, 95 % {low} to {high}, {n} pairs", **_written(alpha, "{:.2f}"), n=alpha["n"])
            lines.append((say("agreement on {what}", what=what), told))
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

"""Votes of judges that are machines: how often people agree with them, and whether they may be trained on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from pipeline.data.votes import SKIP, Vote
from pipeline.errors import UserError

ENOUGH = 20
"""Pairs that people must have checked before a judge is trained on."""


def by_people(votes: Sequence[Vote]) -> dict[str, str]:
    """What people said of each pair, as Vote.named() names it: what most of them said, or a tie of those said most
    often. Skips say nothing, and known answers are no labels."""
    said: dict[str, Counter[str]] = defaultdict(Counter)
    for vote in votes:
        if not vote.judge and vote.gold is None and vote.choice != SKIP:
            said[vote.pair][vote.named(vote.choice)] += 1
    most = {pair: counts.most_common(2) for pair, counts in said.items()}
    return {pair: "tie" if len({n for _, n in two}) < len(two) else two[0][0] for pair, two in most.items()}


def checked(votes: Sequence[Vote]) -> dict[str, list[bool]]:
    """By judge, of each pair on which both it and people chose an answer, whether it is the same one. A tie of either
    side, or both bad, chooses none."""
    people = by_people(votes)
    found: dict[str, list[bool]] = {vote.annotator: [] for vote in votes if vote.judge}
    for vote in votes:
        said = people.get(vote.pair, "")
        if vote.judge and isinstance(vote.choice, int) and said.isdigit():
            found[vote.annotator].append(vote.named(vote.choice) == said)
    return found


def hold(path: str, votes: Sequence[Vote], bound: float) -> None:
    """Raises UserError where a judge whose votes would be trained on agrees with people on less than `bound` of the
    pairs that they have checked, or where they have checked too few. A bound of 0 asks nothing."""
    people = by_people(votes)
    relied_on = {vote.annotator for vote in votes if vote.judge and vote.pair not in people}
    for judge, same in checked(votes).items():
        if judge not in relied_on or not bound:
            continue
        more = "or write judge_agreement: 0 in the stage's data section to train on its votes all the same"
        if len(same) < ENOUGH:
            raise UserError(
                f"{path}: people have checked {len(same)} pairs on which {judge} chose an answer, and {ENOUGH} are "
                f"needed before a stage is trained on its votes. Let people check more with onebase label, {more}"
            )
        if sum(same) < bound * len(same):
            from scipy.stats import binomtest  # takes a second to import

            ends = binomtest(sum(same), len(same)).proportion_ci(method="wilson")
            raise UserError(
                f"{path}: {judge} agrees with people on {sum(same) / len(same):.0%} of {len(same)} pairs (95 %: "
                f"{ends.low:.0%} to {ends.high:.0%}), which is less than judge_agreement {bound:g}. Take its file out "
                f"of the folder, {more}"
            )

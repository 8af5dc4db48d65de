"""The words of a verdict, and what several of its sentences say alike."""

from __future__ import annotations

from pipeline.evaluate.stored import Verdict
from pipeline.language.say import say
from pipeline.measure.metric import Estimate

BETTER, WORSE, UNCLEAR, WARNING = "better", "worse", "unclear", "warning"
UNSHOWN = "unshown"
"""It rose in what it was trained on, and in nothing else."""

PEOPLE = "people"
"""The judge of the arena in which people vote."""
FEW = 20
"""Held-out rows below which a change is told and nothing is claimed of it: so few are often alike."""


def too_few(found: Estimate) -> bool:
    return 0 < found.n < FEW  # 0: not known


def judged_by(judge: str) -> str:
    if judge == PEOPLE:
        return say("by people")
    if judge == "truth":
        return say("by the checked truth")
    return say("by the external judge") if judge == "judge" else say("by {judge}'s score", judge=judge)


def compare(word: str, parent: str) -> str:
    if word == UNCLEAR:
        return say("Not to be told from {parent}", parent=parent)
    return say("Better than {parent}", parent=parent) if word == BETTER else say("Worse than {parent}", parent=parent)


def nothing_held_out() -> Verdict:
    return Verdict(word=UNCLEAR, text=say("Nothing held out to judge it by: give it a data.test."))


def several(said: list[str]) -> str:
    return say("; ").join(said)


def sentences(*said: str) -> str:
    return say(" ").join(said)


def capital(told: str) -> str:
    return told[0].upper() + told[1:]

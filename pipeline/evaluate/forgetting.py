"""What a policy has kept of what each stage before it had learnt: its held-out loss, and its greedy answers.

A policy is compared with the very stage that had learnt it, row by row, and not with the stage just before.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.disk.atomic import Json
from pipeline.evaluate.measure import Measure
from pipeline.evaluate.measures import CorpusLoss, Questions
from pipeline.evaluate.stored import Kept, Link
from pipeline.measure.metric import QUESTION_ACCURACY, Estimate
from pipeline.stages import STAGES


def measure(taken: list[tuple[Measure, Json]], chain: list[Link]) -> dict[str, dict[str, dict[str, Kept]]]:
    """By policy, by stage that it comes from, by the name of the number."""
    values = {(one.name, one.subject): record["value"] for one, record in taken if one.step is None}
    links = {link.name: link for link in chain}
    found: dict[str, dict[str, dict[str, Kept]]] = {}
    for link in chain:
        for earlier in _ancestors(links, link) if link.answers else ():
            numbers = dict(_loss(values, link.name, earlier)) | dict(_questions(values, link.name, earlier))
            if numbers:
                found.setdefault(link.name, {})[earlier.name] = numbers
    return found


def _ancestors(links: dict[str, Link], link: Link) -> Iterator[Link]:
    """Nearest first."""
    while link.parent in links:
        link = links[link.parent]
        yield link


def _loss(values: dict[tuple[str, str], Json], policy: str, earlier: Link) -> Iterator[tuple[str, Kept]]:
    metric = STAGES[earlier.kind].held_out_loss
    before, after = (values.get((earlier.held_out, name)) for name in (earlier.name, policy))
    if metric and before and after:
        numbers = [next(iter(CorpusLoss.numbers(value).values())) for value in (before, after)]
        (change,) = CorpusLoss.changes(after, before).values()
        yield metric.name, Kept(before=numbers[0], after=numbers[1], change=change)


def _questions(values: dict[tuple[str, str], Json], policy: str, earlier: Link) -> Iterator[tuple[str, Kept]]:
    before, after = (values.get((Questions.called, name)) for name in (earlier.name, policy))
    if earlier.asked and before and after:
        own = [{key: [told[place] for place in earlier.asked] for key, told in v.items()} for v in (before, after)]
        name = QUESTION_ACCURACY.name
        was, now = (Questions.numbers(value)[name] for value in own)
        yield name, Kept(before=was, after=now, change=Questions.changes(own[1], own[0])[name])


def flat(found: dict[str, dict[str, Kept]]) -> dict[str, float]:
    """Of one policy, by the names under which a recipe may make demands of them."""
    numbers: dict[str, float] = {}
    for stage, kept in found.items():
        for name, one in kept.items():
            numbers |= Estimate.numbers(one.change, f"forgetting.{stage}.{name}")
    return numbers

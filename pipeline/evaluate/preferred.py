"""The verdict on a stage that a preference has trained: what it was paid by does not show that it is better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.data.contracts import RATED
from pipeline.evaluate.stored import Results, Verdict
from pipeline.evaluate.wording import (
    BETTER,
    PEOPLE,
    UNCLEAR,
    UNSHOWN,
    WARNING,
    WORSE,
    compare,
    judged_by,
    sentences,
    several,
    too_few,
)
from pipeline.language.say import say, say_again
from pipeline.measure.metric import KL, PREFERENCE_ACCURACY, QUESTION_ACCURACY, REWARD, SHARE, TRUTH, Estimate
from pipeline.stages import STAGES
from pipeline.stages.stage import StageSpec


@dataclass
class Evidence:
    """What each measure says of a stage, sorted by where it points."""

    told: dict[str, list[str]] = field(default_factory=lambda: {BETTER: [], WORSE: [], UNCLEAR: []})
    few: list[str] = field(default_factory=list)
    """Of too few held-out rows."""
    learnt: list[str] = field(default_factory=list)
    """What has risen of that which it was trained on."""

    def add(self, word: str, said: str, own: bool, found: Estimate) -> None:
        if too_few(found):
            self.few.append(say("{said} (n {n})", said=said, n=found.n))
        else:
            (self.learnt if own and word == BETTER else self.told[word]).append(said)

    @property
    def any(self) -> bool:
        return any(self.told.values()) or bool(self.learnt or self.few)


def of_preference(results: Results, name: str) -> Verdict:
    """By every measure that the stage was not trained on (the checked truth, questions, another judge): better by at
    least one and worse by none, or the other way round; what they disagree on is a warning.

    What it was trained on (stage.own_judges, and for dpo and kto which of two answers is likelier) is learnt, mistakes
    included (arXiv 2210.10760): it may say that a stage is worse, never that it is better."""
    parent, numbers = results.parents[name], results.numbers[name]
    found = _gather(results, name)
    flagged = results.over_optimised.get(name)
    if flagged and not found.learnt:  # the mean has risen where the win rate has not
        found.learnt.append(say("mean reward {change}", change=REWARD.change(results.changes[name]["reward"])))
    if not found.any:
        return Verdict(word=UNCLEAR, text=say("Nothing held out to judge it by: give it a data.test or questions."))
    others = results.arenas.keys() - {PEOPLE}
    higher = say("Higher reward") if others else say("Trained for")
    for_it, against, rose = (several(said) for said in (found.told[BETTER], found.told[WORSE], found.learnt))
    after = []
    if found.told[WORSE] and (for_it or flagged):
        what = say("Over-optimised") if flagged else say("Better and worse than {parent}", parent=parent)
        both = several([*found.learnt, *found.told[BETTER]])
        word, first = WARNING, say("{what}: {both}, but {against}.", what=what, both=both, against=against)
    elif found.told[WORSE]:
        word, first = WORSE, say("{compared}: {told}.", compared=compare(WORSE, parent), told=against)
        if rose:
            after.append(say("{higher} all the same: {rose}.", higher=higher, rose=rose))
    elif found.told[BETTER]:
        word, first = BETTER, say("{compared}: {told}.", compared=compare(BETTER, parent), told=for_it)
        if rose:
            after.append(say("{higher} too: {rose}.", higher=higher, rose=rose))
    elif found.learnt:
        word = UNSHOWN
        first = say("{higher}; not shown to be better than {parent}: {rose}.", higher=higher, parent=parent, rose=rose)
        if not found.told[UNCLEAR]:
            after.append(
                say("Nothing else judges it: give it questions, a function with truth: true, or onebase eval --judge.")
            )
    else:
        word, first = UNCLEAR, say("{compared}.", compared=compare(UNCLEAR, parent))
    if found.few:
        after.append(say("Too few to rely on: {told}.", told=several(found.few)))
    if found.told[UNCLEAR]:
        after.append(say("Within chance: {told}.", told=several(found.told[UNCLEAR])))
    if "kl" in numbers:
        kl = KL.number(numbers["kl"].value)
        after.append(say("It is {kl} nats an answer away from {parent}.", kl=kl, parent=parent))
    return Verdict(word=word, text=sentences(first, *after))


def _gather(results: Results, name: str) -> Evidence:
    """Arenas first, of them the one by people; then questions, and which answer is likelier where nothing else
    judges."""
    parent, arenas, changes = results.parents[name], results.arenas, results.changes[name]
    stage, found = next(stage for stage in results.chain if stage.name == name), Evidence()
    for judge in sorted(arenas, key=lambda judge: {PEOPLE: 0, "judge": 1, "truth": 2}.get(judge, 3)):
        rate = arenas[judge].wins.get(name, {}).get(parent)
        if rate:
            why = stage.own_judges.get(judge, "")
            said = say("wins {rate} {by}", rate=SHARE.shown(rate), by=judged_by(judge))
            said = say("{said}, {why}", said=said, why=say_again(why)) if why else said
            low, high = rate.low or 0.0, 1.0 if rate.high is None else rate.high
            found.add(BETTER if low > 0.5 else WORSE if high < 0.5 else UNCLEAR, said, bool(why), rate)
    asked = {QUESTION_ACCURACY: QUESTION_ACCURACY.said}
    if not arenas.keys() - {PEOPLE}:
        asked[PREFERENCE_ACCURACY] = say("the better answer is likelier")
    for metric, label in asked.items():
        if metric.name in changes:
            change, kind = changes[metric.name], STAGES[stage.kind]
            own = metric.name == kind.raises or (metric is PREFERENCE_ACCURACY and kind.contract is RATED)
            said = say("{label} {change}", label=label, change=metric.change(change))
            said = say("{said}, which is what {kind} trains", said=said, kind=stage.kind) if own else said
            found.add(metric.word(change) or UNCLEAR, said, own, change)
    return found


def of_itself(section: StageSpec, before: Mapping[str, float], after: Mapping[str, float]) -> str | None:
    """What a stage's own numbers show where it has risen in what it was trained on; None where it has not. Of the other
    numbers only what is right among sampled answers has an interval (ppo/held_out.py)."""
    raised = STAGES[section.kind].raised
    if raised is None or raised.name not in before or not after.get(raised.name, -math.inf) > before[raised.name]:
        return None
    paid = bool(section.reward_terms())
    what = say("Higher reward") if paid else say("The {label}", label=raised.said)
    asked, more = QUESTION_ACCURACY, []
    truth = _truth_gain(section, after)
    change = TRUTH.change(truth) if truth else ""
    if asked.name in before and asked.name in after:
        told = asked.written(after[asked.name] - before[asked.name], sign=True)
        more.append(say("Questions answered right {change}.", change=told))
    if truth and truth.above:
        return sentences(say("{what}, and more sampled answers right: {change}.", what=what, change=change), *more)
    if truth and truth.below:
        what = what[0].lower() + what[1:]
        first = say("Over-optimised: {what}, but fewer sampled answers right: {change}.", what=what, change=change)
        return sentences(first, *more)
    why = say("that is what it was paid by") if paid else say("that is what {kind} trains", kind=section.kind)
    if truth:
        more.insert(0, say("Within chance: sampled answers right {change}.", change=change))
    return sentences(say("{what}; not shown to be better: {why}.", what=what, why=why), *more)


def _truth_gain(section: StageSpec, after: Mapping[str, float]) -> Estimate | None:
    """By how much more sampled answers are right, where the reward has a checked truth."""
    terms = section.reward_terms()
    truth = next((term for term in terms if term.truth), None)
    if truth is None:
        return None
    # A reward of one term is noted as the reward alone, times its weight.
    name, scale = (f"reward/{truth.source}_gain", 1.0) if len(terms) > 1 else ("reward_gain", truth.weight)
    found = Estimate.among(after, name)
    return found.scaled(1 / scale) if found and scale > 0 else None

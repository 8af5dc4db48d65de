"""One sentence for each stage: better than the stage before, worse, or not to be told apart, and by how much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from pipeline.data.contracts import RATED
from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.errors import UserError
from pipeline.evaluate.stored import Link, Results, RewardModel, Verdict, read_results
from pipeline.language.say import say, say_again
from pipeline.measure.metric import (
    KL,
    PREFERENCE_ACCURACY,
    QUESTION_ACCURACY,
    REWARD,
    SHARE,
    TRUTH,
    Estimate,
    Metric,
    perplexity,
)
from pipeline.stages import STAGES
from pipeline.stages.stage import Stage, StageSpec

BETTER, WORSE, UNCLEAR, WARNING = "better", "worse", "unclear", "warning"
UNSHOWN = "unshown"
"""It rose in what it was trained on, and in nothing else."""

PEOPLE = "people"
"""The judge of the arena in which people vote."""
FEW = 20
"""Held-out rows below which a change is told and nothing is claimed of it: so few are often alike."""


def find(results: Results) -> dict[str, Verdict]:
    """Of every stage, in the language that is spoken."""
    found = {}
    for stage in results.chain:
        name, kind = stage.name, STAGES[stage.kind]
        if kind.ranks:
            found[name] = _reward(results.reward_models.get(name))
        elif kind.raises:
            found[name] = _preference_trained(results, name)
        elif kind.learnt == "answers" and QUESTION_ACCURACY.name in results.changes[name]:
            found[name] = _questions(results, name)
        elif kind.held_out_loss:
            found[name] = _loss(results, name, kind.held_out_loss)
        else:
            found[name] = _of_its_headline(stage, kind)
    return found


def read(run: Path) -> dict[tuple[str, str], Verdict]:
    """Of the last evaluation, by stage and sha256 of its adapter, where that adapter and the one it is compared with
    still lie in the run's folder."""
    try:
        results = read_results(run / "evaluation")
        chain = {stage.name: stage for stage in results.chain} if results else {}
        there = {name: Artifact(run / name).manifest() for name in chain}
    except UserError:
        return {}
    found = find(results) if results else {}
    same = {name for name, known in there.items() if known and known.files.get(WEIGHTS) == chain[name].adapter}
    return {
        (name, chain[name].adapter): found[name]
        for name in same
        if chain[name].parent not in chain or chain[name].parent in same
    }


def _loss(results: Results, name: str, metric: Metric) -> Verdict:
    parent, change = results.parents[name], results.changes[name].get(metric.name)
    if change is None:
        return _nothing_held_out()
    before, after = (results.numbers[policy][metric.name].value for policy in (parent, name))
    values = {
        "n": change.n,
        "label": metric.heading,
        "before": metric.number(before),
        "after": metric.number(after),
        "change": metric.change(change),
        "was": f"{perplexity(before):.1f}",
        "now": f"{perplexity(after):.1f}",
    }
    if _too_few(change):
        text = say(
            "On {n} held-out rows: too few to rely on. {label}: {before} to {after} ({change}), perplexity {was} to "
            "{now}.",
            **values | {"label": _capital(metric.heading)},
        )
        return Verdict(word=UNCLEAR, text=text)
    word = metric.word(change) or UNCLEAR
    text = say(
        "{compared} on {n} held-out rows, {label}: {before} to {after} ({change}), perplexity {was} to {now}.",
        compared=_compared(word, parent),
        **values,
    )
    return Verdict(word=word, text=text)


def _questions(results: Results, name: str) -> Verdict:
    asked, parent = QUESTION_ACCURACY, results.parents[name]
    change = results.changes[name][asked.name]
    before, after = (results.numbers[policy][asked.name] for policy in (parent, name))
    values = {
        "before": asked.written(before.value),
        "after": asked.written(after.value),
        "n": after.n,
        "change": asked.change(change),
    }
    if _too_few(after):
        text = say("On {n} questions: too few to rely on. {before} to {after} answered right ({change}).", **values)
        return Verdict(word=UNCLEAR, text=text)
    word = asked.word(change) or UNCLEAR
    text = say(
        "{compared}: {before} to {after} of {n} questions answered right ({change}).",
        compared=_compared(word, parent),
        **values,
    )
    return Verdict(word=word, text=text)


def _of_its_headline(stage: Link, kind: Stage) -> Verdict:
    """By the first of the numbers that the stage takes of itself, before and after."""
    before, after = stage.before, stage.after
    metric = next((metric for metric in kind.headlines if metric.name in before and metric.name in after), None)
    if metric is None:
        return _of_its_rivals(stage, kind)
    told = say(
        "{label} {before} to {after}",
        label=metric.said,
        before=metric.written(before[metric.name]),
        after=metric.written(after[metric.name]),
    )
    gain = Estimate.among(after, f"{metric.name}_gain")
    if gain is None or gain.low is None:
        return Verdict(word=UNCLEAR, text=say("{told}; how far chance reaches is not known.", told=_capital(told)))
    word = metric.word(gain) or UNCLEAR
    compared = {BETTER: say("Better than before"), WORSE: say("Worse than before")}.get(word)
    compared = compared or say("Not to be told from before")
    text = say("{compared}: {told} ({change}).", compared=compared, told=told, change=metric.change(gain))
    return Verdict(word=word, text=text)


def _of_its_rivals(stage: Link, kind: Stage) -> Verdict:
    """By how far it is over a simpler rule, where there is nothing before it to compare with."""
    measured = [metric for metric in kind.headlines if metric.name in stage.after]
    if not measured:
        return _nothing_held_out()
    first = measured[0]
    told = f"{_capital(first.said)} {first.written(stage.after[first.name])}"
    over = next((metric for metric in measured if metric.name.startswith("over_")), None)
    gain = Estimate.among(stage.after, over.name) if over else None
    if over is None or gain is None:
        return Verdict(word=UNCLEAR, text=say("{told}; there is nothing to compare it with.", told=told))
    text = say("{told}; {label} {change}.", told=told, label=over.said, change=over.change(gain))
    return Verdict(word=over.word(gain) or UNCLEAR, text=text)


def _reward(found: RewardModel | None) -> Verdict:
    if found is None:
        return _nothing_held_out()
    text = say(
        "Ranks {share} of {n} held-out pairs right; choosing the longer answer gets {longer}, a bag of words {words}. "
        "Calibration error {error}.",
        share=SHARE.shown(found.accuracy),
        n=found.accuracy.n,
        longer=SHARE.written(found.longer_wins.value),
        words=SHARE.written(found.bag_of_words.value),
        error=f"{found.ece:.2f}",
    )
    text = say(" ").join(filter(None, [text, _of_the_heads(found)]))
    if _too_few(found.accuracy):
        told = say("On {n} held-out pairs: too few to rely on. {text}", n=found.accuracy.n, text=text)
        return Verdict(word=UNCLEAR, text=told)
    if found.flags:
        flags = say(" and ").join(say_again(flag) for flag in found.flags)
        return Verdict(word=WARNING, text=say("{text} It {flags}.", text=text, flags=flags))
    if found.over_words.above:
        return Verdict(word=BETTER, text=say("Better than both simple rules. {text}", text=text))
    more = say("A bag of words is not clearly worse, so it may have learnt little but vocabulary.")
    return Verdict(word=BETTER, text=say("Better than choosing the longer answer. {text} {more}", text=text, more=more))


def _of_the_heads(found: RewardModel) -> str:
    """By how much the heads differ, and whether that tells errors; "" where there is one."""
    own, other, over = (
        found.disagreement.get(name) for name in ("deviation", "deviation_swapped", "agreed_over_disputed")
    )
    if own is None:
        return ""
    told = [say("Its heads differ by {value} on held-out answers.", value=f"{own.value:.2f}")]
    if other is not None:
        value = f"{other.value:.2f}"
        told.append(say("On answers that were given to another prompt they differ by {value}.", value=value))
    if over is not None:
        points, range_ = SHARE.number(over.value), SHARE.range(over, sign=True)
        told.append(
            say(
                "The half of the pairs on which they agree most is ranked right {points} points more often than the "
                "other half, 95 %: {range}.",
                points=points,
                range=range_,
            )
        )
    return say(" ").join(told)


def _preference_trained(results: Results, name: str) -> Verdict:
    """By every measure that the stage was not trained on (the checked truth, questions, another judge): better by at
    least one and worse by none, or the other way round; what they disagree on is a warning.

    What it was trained on (stage.own_judges, and for dpo and kto which of two answers is likelier) is learnt, mistakes
    included (arXiv 2210.10760): it may say that a stage is worse, never that it is better."""
    parent, arenas = results.parents[name], results.arenas
    numbers, changes = results.numbers[name], results.changes[name]
    stage = next(stage for stage in results.chain if stage.name == name)
    told: dict[str, list[str]] = {BETTER: [], WORSE: [], UNCLEAR: []}
    few: list[str] = []
    learnt: list[str] = []
    """What has risen of that which it was trained on."""

    def tell(word: str, said: str, own: bool, found: Estimate) -> None:
        if _too_few(found):
            few.append(say("{said} (n {n})", said=said, n=found.n))
        else:
            (learnt if own and word == BETTER else told[word]).append(said)

    for judge in sorted(arenas, key=lambda judge: {PEOPLE: 0, "judge": 1, "truth": 2}.get(judge, 3)):
        rate = arenas[judge].wins.get(name, {}).get(parent)
        if rate:
            why = stage.own_judges.get(judge, "")
            said = say("wins {rate} {by}", rate=SHARE.shown(rate), by=judged_by(judge))
            said = say("{said}, {why}", said=said, why=say_again(why)) if why else said
            low, high = rate.low or 0.0, 1.0 if rate.high is None else rate.high
            tell(BETTER if low > 0.5 else WORSE if high < 0.5 else UNCLEAR, said, bool(why), rate)
    asked = {QUESTION_ACCURACY: QUESTION_ACCURACY.said}
    others = arenas.keys() - {PEOPLE}
    if not others:
        asked[PREFERENCE_ACCURACY] = say("the better answer is likelier")
    for metric, label in asked.items():
        if metric.name in changes:
            change, kind = changes[metric.name], STAGES[stage.kind]
            own = metric.name == kind.raises or (metric is PREFERENCE_ACCURACY and kind.contract is RATED)
            said = say("{label} {change}", label=label, change=metric.change(change))
            said = say("{said}, which is what {kind} trains", said=said, kind=stage.kind) if own else said
            tell(metric.word(change) or UNCLEAR, said, own, change)
    flagged = results.over_optimised.get(name)
    if flagged and not learnt:  # the mean has risen where the win rate has not
        learnt.append(say("mean reward {change}", change=REWARD.change(changes["reward"])))
    if not any(told.values()) and not learnt and not few:
        return Verdict(word=UNCLEAR, text=say("Nothing held out to judge it by: give it a data.test or questions."))
    after = []
    if few:
        after.append(say("Too few to rely on: {told}.", told=_several(few)))
    if told[UNCLEAR]:
        after.append(say("Within chance: {told}.", told=_several(told[UNCLEAR])))
    if "kl" in numbers:
        kl = KL.number(numbers["kl"].value)
        after.append(say("It is {kl} nats an answer away from {parent}.", kl=kl, parent=parent))
    higher = say("Higher reward") if others else say("Trained for")
    for_it, against, rose = (_several(said) for said in (told[BETTER], told[WORSE], learnt))
    if told[WORSE] and (told[BETTER] or flagged):
        what = say("Over-optimised") if flagged else say("Better and worse than {parent}", parent=parent)
        both = _several([*learnt, *told[BETTER]])
        word, first = WARNING, say("{what}: {both}, but {against}.", what=what, both=both, against=against)
    elif told[WORSE]:
        word, first = WORSE, say("{compared}: {told}.", compared=_compared(WORSE, parent), told=against)
        if learnt:
            after.insert(0, say("{higher} all the same: {rose}.", higher=higher, rose=rose))
    elif told[BETTER]:
        word, first = BETTER, say("{compared}: {told}.", compared=_compared(BETTER, parent), told=for_it)
        if learnt:
            after.insert(0, say("{higher} too: {rose}.", higher=higher, rose=rose))
    elif learnt:
        word = UNSHOWN
        first = say("{higher}; not shown to be better than {parent}: {rose}.", higher=higher, parent=parent, rose=rose)
        if not told[UNCLEAR]:
            after.insert(
                0,
                say("Nothing else judges it: give it questions, a function with truth: true, or onebase eval --judge."),
            )
    else:
        word, first = UNCLEAR, say("{compared}.", compared=_compared(UNCLEAR, parent))
    return Verdict(word=word, text=_sentences(first, *after))


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
        return _sentences(say("{what}, and more sampled answers right: {change}.", what=what, change=change), *more)
    if truth and truth.below:
        what = what[0].lower() + what[1:]
        first = say("Over-optimised: {what}, but fewer sampled answers right: {change}.", what=what, change=change)
        return _sentences(first, *more)
    why = say("that is what it was paid by") if paid else say("that is what {kind} trains", kind=section.kind)
    if truth:
        more.insert(0, say("Within chance: sampled answers right {change}.", change=change))
    return _sentences(say("{what}; not shown to be better: {why}.", what=what, why=why), *more)


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


def _too_few(found: Estimate) -> bool:
    return 0 < found.n < FEW  # 0: not known


def judged_by(judge: str) -> str:
    if judge == PEOPLE:
        return say("by people")
    if judge == "truth":
        return say("by the checked truth")
    return say("by the external judge") if judge == "judge" else say("by {judge}'s score", judge=judge)


def _compared(word: str, parent: str) -> str:
    if word == UNCLEAR:
        return say("Not to be told from {parent}", parent=parent)
    return say("Better than {parent}", parent=parent) if word == BETTER else say("Worse than {parent}", parent=parent)


def _nothing_held_out() -> Verdict:
    return Verdict(word=UNCLEAR, text=say("Nothing held out to judge it by: give it a data.test."))


def _several(said: list[str]) -> str:
    return say("; ").join(said)


def _sentences(*said: str) -> str:
    return say(" ").join(said)


def _capital(told: str) -> str:
    return told[0].upper() + told[1:]

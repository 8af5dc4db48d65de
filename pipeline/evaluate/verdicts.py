"""One sentence for each stage: better than the stage before, worse, or not to be told apart, and by how much."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pipeline.evaluate.stored import Link, Results, RewardModel, Verdict
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
COMPARED = {BETTER: "Better than", WORSE: "Worse than", UNCLEAR: "Not to be told from"}
INDEPENDENT = "Nothing else judges it: give it questions, a function with truth: true, or onebase eval --judge."


def find(results: Results) -> dict[str, Verdict]:
    """Of every stage."""
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


def _loss(results: Results, name: str, metric: Metric) -> Verdict:
    parent, change = results.parents[name], results.changes[name].get(metric.name)
    if change is None:
        return Verdict(word=UNCLEAR, text=f"Nothing held out to judge it by: give {name} a data.test.")
    before, after = (results.numbers[policy][metric.name].value for policy in (parent, name))
    word = metric.word(change) or UNCLEAR
    return Verdict(
        word=word,
        text=f"{COMPARED[word]} {parent} on held-out rows, {metric.label}: {metric.number(before)} to "
        f"{metric.number(after)} {metric.unit} "
        f"({metric.change(change)}), perplexity {perplexity(before):.1f} to {perplexity(after):.1f}.",
    )


def _questions(results: Results, name: str) -> Verdict:
    asked, parent = QUESTION_ACCURACY, results.parents[name]
    change = results.changes[name][asked.name]
    before, after = (results.numbers[policy][asked.name] for policy in (parent, name))
    word = asked.word(change) or UNCLEAR
    return Verdict(
        word=word,
        text=f"{COMPARED[word]} {parent}: {asked.written(before.value)} to {asked.written(after.value)} of {after.n} "
        f"{asked.label} ({asked.change(change)}).",
    )


def _of_its_headline(stage: Link, kind: Stage) -> Verdict:
    """By the first of the numbers that the stage takes of itself, before and after."""
    before, after = stage.before, stage.after
    metric = next((metric for metric in kind.headlines if metric.name in before and metric.name in after), None)
    if metric is None:
        return _of_its_rivals(stage, kind)
    told = f"{metric.label} {metric.written(before[metric.name])} to {metric.written(after[metric.name])}"
    gain = Estimate.among(after, f"{metric.name}_gain")
    if gain is None or gain.low is None:
        return Verdict(word=UNCLEAR, text=f"{told[0].upper()}{told[1:]}; how far chance reaches is not known.")
    word = metric.word(gain) or UNCLEAR
    return Verdict(word=word, text=f"{COMPARED[word]} before: {told} ({metric.change(gain)}).")


def _of_its_rivals(stage: Link, kind: Stage) -> Verdict:
    """By how far it is over a simpler rule, where there is nothing before it to compare with."""
    measured = [metric for metric in kind.headlines if metric.name in stage.after]
    if not measured:
        return Verdict(word=UNCLEAR, text="Nothing held out to judge it by: give it a data.test.")
    first = measured[0]
    told = f"{first.label[0].upper()}{first.label[1:]} {first.written(stage.after[first.name])}"
    over = next((metric for metric in measured if metric.name.startswith("over_")), None)
    gain = Estimate.among(stage.after, over.name) if over else None
    if over is None or gain is None:
        return Verdict(word=UNCLEAR, text=f"{told}; there is nothing to compare it with.")
    return Verdict(word=over.word(gain) or UNCLEAR, text=f"{told}; {over.label} {over.change(gain)}.")


def _reward(found: RewardModel | None) -> Verdict:
    if found is None:
        return Verdict(word=UNCLEAR, text="Nothing held out to judge it by: give it a data.test.")
    text = (
        f"Ranks {SHARE.shown(found.accuracy)} of {found.accuracy.n} held-out pairs right; choosing the longer "
        f"answer gets {SHARE.written(found.longer_wins.value)}, a bag of words "
        f"{SHARE.written(found.bag_of_words.value)}. Calibration error {found.ece:.2f}."
    )
    if found.flags:
        return Verdict(word=WARNING, text=f"{text} It {' and '.join(found.flags)}.")
    if found.over_words.above:
        return Verdict(word=BETTER, text=f"Better than both simple rules. {text}")
    more = "A bag of words is not clearly worse, so it may have learnt little but vocabulary."
    return Verdict(word=BETTER, text=f"Better than choosing the longer answer. {text} {more}")


def _preference_trained(results: Results, name: str) -> Verdict:
    """By every measure that the stage was not trained on (the checked truth, questions, another judge): better by at
    least one and worse by none, or the other way round; what they disagree on is a warning.

    What it was trained on (stage.own_judges, and for dpo which of two answers is likelier) is learnt, mistakes
    included (arXiv 2210.10760): it may say that a stage is worse, never that it is better."""
    parent, arenas = results.parents[name], results.arenas
    numbers, changes = results.numbers[name], results.changes[name]
    stage = next(stage for stage in results.chain if stage.name == name)
    told: dict[str, list[str]] = {BETTER: [], WORSE: [], UNCLEAR: []}
    learnt: list[str] = []
    """What has risen of that which it was trained on."""

    def tell(word: str, said: str, own: bool) -> None:
        (learnt if own and word == BETTER else told[word]).append(said)

    for judge in sorted(arenas, key=lambda judge: {"judge": 0, "truth": 1}.get(judge, 2)):
        rate = arenas[judge].wins.get(name, {}).get(parent)
        if rate:
            why = stage.own_judges.get(judge, "")
            said = f"wins {SHARE.shown(rate)} {_by(judge)}{', ' if why else ''}{why}"
            low, high = rate.low or 0.0, 1.0 if rate.high is None else rate.high
            tell(BETTER if low > 0.5 else WORSE if high < 0.5 else UNCLEAR, said, bool(why))
    asked = {QUESTION_ACCURACY: QUESTION_ACCURACY.label}
    if not arenas:
        asked[PREFERENCE_ACCURACY] = f"the {PREFERENCE_ACCURACY.label}"
    for metric, label in asked.items():
        if metric.name in changes:
            change, own = changes[metric.name], metric.name == STAGES[stage.kind].raises
            why = f", which is what {stage.kind} trains" if own else ""
            tell(metric.word(change) or UNCLEAR, f"{label} {metric.change(change)}{why}", own)
    flagged = results.over_optimised.get(name)
    if flagged and not learnt:  # the mean has risen where the win rate has not
        learnt.append(f"mean reward {REWARD.change(changes['reward'])}")
    if not any(told.values()) and not learnt:
        return Verdict(word=UNCLEAR, text="Nothing held out to judge it by: give it a data.test or questions.")
    distance = f" It is {KL.number(numbers['kl'].value)} {KL.unit} away from {parent}." if "kl" in numbers else ""
    doubt = f" Within chance: {'; '.join(told[UNCLEAR])}." if told[UNCLEAR] else ""
    higher = "Higher reward" if arenas else "Trained for"
    for_it, against, rose = ("; ".join(said) for said in (told[BETTER], told[WORSE], learnt))
    if told[WORSE] and (told[BETTER] or flagged):
        said = "Over-optimised" if flagged else f"Better and worse than {parent}"
        both = "; ".join([*learnt, *told[BETTER]])
        return Verdict(word=WARNING, text=f"{said}: {both}, but {against}.{doubt}{distance}")
    if told[WORSE]:
        all_the_same = f" {higher} all the same: {rose}." if learnt else ""
        return Verdict(word=WORSE, text=f"Worse than {parent}: {against}.{all_the_same}{doubt}{distance}")
    if told[BETTER]:
        too = f" {higher} too: {rose}." if learnt else ""
        return Verdict(word=BETTER, text=f"Better than {parent}: {for_it}.{too}{doubt}{distance}")
    if learnt:
        said = f"{higher}; not shown to be better than {parent}: {rose}."
        wanted = "" if doubt else f" {INDEPENDENT}"
        return Verdict(word=UNSHOWN, text=f"{said}{doubt}{wanted}{distance}")
    return Verdict(word=UNCLEAR, text=f"Not to be told from {parent}.{doubt}{distance}")


def of_itself(section: StageSpec, before: Mapping[str, float], after: Mapping[str, float]) -> str | None:
    """What a stage's own numbers show where it has risen in what it was trained on; None where it has not. Of the other
    numbers only what is right among sampled answers has an interval (ppo/held_out.py)."""
    raised = STAGES[section.kind].raised
    if raised is None or raised.name not in before or not after.get(raised.name, -math.inf) > before[raised.name]:
        return None
    paid = bool(section.reward_terms())
    what = "Higher reward" if paid else f"The {raised.label}"
    why = "that is what it was paid by" if paid else f"that is what {section.kind} trains"
    asked, answered = QUESTION_ACCURACY, ""
    if asked.name in before and asked.name in after:
        change = after[asked.name] - before[asked.name]
        answered = f" {asked.label.capitalize()} {asked.written(change, sign=True)}."
    truth = _truth_gain(section, after)
    if truth and truth.above:
        return f"{what}, and more {TRUTH.label}: {TRUTH.change(truth)}.{answered}"
    if truth and truth.below:
        return f"Over-optimised: {what.lower()}, but fewer {TRUTH.label}: {TRUTH.change(truth)}.{answered}"
    doubt = f" Within chance: {TRUTH.label} {TRUTH.change(truth)}." if truth else ""
    return f"{what}; not shown to be better: {why}.{doubt}{answered}"


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


def _by(judge: str) -> str:
    return {"truth": "by the checked truth", "judge": "by the external judge"}.get(judge, f"by {judge}'s score")

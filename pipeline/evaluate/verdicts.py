"""One sentence for each stage: better than the stage before, worse, or not to be told apart, and by how much."""

from __future__ import annotations

import math

from pipeline.artifact import Json
from pipeline.evaluate.metric import INFINITY, MINUS
from pipeline.stages.stage import StageSpec

BETTER, WORSE, UNCLEAR, WARNING = "better", "worse", "unclear", "warning"
UNSHOWN = "unshown"
"""It rose in what it was trained on, and in nothing else."""
INDEPENDENT = "Nothing else judges it: give it questions, a function with truth: true, or onebase eval --judge."


def spoken(results: Json) -> Json:
    """For each stage {"word": better | worse | unclear | unshown | warning, "text": the sentence}."""
    found = {}
    for stage in results["chain"]:
        name, kind = stage["name"], stage["kind"]
        if kind == "reward":
            found[name] = _reward(results["reward_models"].get(name))
        elif kind == "pretrain":
            found[name] = _loss(results, name, "corpus_loss", "corpus")
        elif kind == "sft":
            found[name] = _sft(results, name)
        else:
            found[name] = _preference_trained(results, name)
    return found


def _verdict(word: str, text: str) -> Json:
    return {"word": word, "text": text}


def _loss(results: Json, name: str, metric: str, what: str) -> Json:
    parent, change = results["parents"][name], results["changes"][name].get(metric)
    if change is None:
        return _verdict(UNCLEAR, f"Nothing held out to judge it by: give {name} a data.test.")
    before, after = (results["numbers"][policy][metric]["value"] for policy in (parent, name))
    word = BETTER if change["high"] < 0 else WORSE if change["low"] > 0 else UNCLEAR
    said = {BETTER: "Better than", WORSE: "Worse than", UNCLEAR: "Not to be told from"}[word]
    return _verdict(
        word,
        f"{said} {parent} on held-out {what} text: {before:.2f} to {after:.2f} nats a token "
        f"({_span(change)}), perplexity {_perplexity(before)} to {_perplexity(after)}.",
    )


def _sft(results: Json, name: str) -> Json:
    change = results["changes"][name].get("question_accuracy")
    if change is None:
        return _loss(results, name, "dialogue_loss", "dialogue")
    parent = results["parents"][name]
    before, after = (results["numbers"][policy]["question_accuracy"] for policy in (parent, name))
    word = _word(change["low"], change["high"])
    said = {BETTER: "Better than", WORSE: "Worse than", UNCLEAR: "Not to be told from"}[word]
    return _verdict(
        word,
        f"{said} {parent}: {_percent(before['value'])} to {_percent(after['value'])} of {after['n']} questions "
        f"answered right ({_points(change)}).",
    )


def _reward(found: Json | None) -> Json:
    if found is None:
        return _verdict(UNCLEAR, "Nothing held out to judge it by: give it a data.test.")
    text = (
        f"Ranks {_percent(found['accuracy']['value'])} ({_range(found['accuracy'])}) of {found['accuracy']['n']} "
        f"held-out pairs right; choosing the longer answer gets {_percent(found['longer_wins']['value'])}, "
        f"a bag of words {_percent(found['bag_of_words']['value'])}. Calibration error {found['ece']:.2f}."
    )
    if found["flags"]:
        return _verdict(WARNING, f"{text} It {' and '.join(found['flags'])}.")
    if found["over_words"]["low"] > 0:
        return _verdict(BETTER, f"Better than both simple rules. {text}")
    more = "A bag of words is not clearly worse, so it may have learnt little but vocabulary."
    return _verdict(BETTER, f"Better than choosing the longer answer. {text} {more}")


def _preference_trained(results: Json, name: str) -> Json:
    """By every measure that the stage was not trained on (the checked truth, questions, another judge): better by at
    least one and worse by none, or the other way round; what they disagree on is a warning.

    What it was trained on (stage["own_judges"], and for dpo which of two answers is likelier) is learnt, mistakes
    included (arXiv 2210.10760): it may say that a stage is worse, never that it is better."""
    parent, arenas = results["parents"][name], results["arenas"]
    numbers, changes = results["numbers"][name], results["changes"][name]
    stage = next(stage for stage in results["chain"] if stage["name"] == name)
    told: dict[str, list[str]] = {BETTER: [], WORSE: [], UNCLEAR: []}
    learnt: list[str] = []
    """What has risen of that which it was trained on."""

    def tell(word: str, said: str, own: bool) -> None:
        (learnt if own and word == BETTER else told[word]).append(said)

    for judge in sorted(arenas, key=lambda judge: {"judge": 0, "truth": 1}.get(judge, 2)):
        rate = arenas[judge]["wins"].get(name, {}).get(parent)
        if rate:
            why = stage["own_judges"].get(judge, "")
            said = f"wins {_percent(rate['value'])} ({_range(rate)}) {_by(judge)}{', ' if why else ''}{why}"
            tell(_word(rate["low"] - 0.5, rate["high"] - 0.5), said, bool(why))
    asked = [("question_accuracy", "questions answered right")]
    if not arenas:
        asked.append(("preference_accuracy", "the better answer is likelier"))
    for metric, label in asked:
        if metric in changes:
            change, own = changes[metric], metric == "preference_accuracy" and stage["kind"] == "dpo"
            why = ", which is what dpo trains" if own else ""
            tell(_word(change["low"], change["high"]), f"{label} {_points(change)}{why}", own)
    flagged = results["over_optimised"].get(name)
    if flagged and not learnt:  # the mean has risen where the win rate has not
        learnt.append(f"mean reward {_span(changes['reward'])}")
    if not any(told.values()) and not learnt:
        return _verdict(UNCLEAR, "Nothing held out to judge it by: give it a data.test or questions.")
    distance = f" It is {numbers['kl']['value']:.1f} nats an answer away from {parent}." if "kl" in numbers else ""
    doubt = f" Within chance: {'; '.join(told[UNCLEAR])}." if told[UNCLEAR] else ""
    higher = "Higher reward" if arenas else "Trained for"
    for_it, against, rose = ("; ".join(said) for said in (told[BETTER], told[WORSE], learnt))
    if told[WORSE] and (told[BETTER] or flagged):
        said = "Over-optimised" if flagged else f"Better and worse than {parent}"
        both = "; ".join([*learnt, *told[BETTER]])
        return _verdict(WARNING, f"{said}: {both}, but {against}.{doubt}{distance}")
    if told[WORSE]:
        all_the_same = f" {higher} all the same: {rose}." if learnt else ""
        return _verdict(WORSE, f"Worse than {parent}: {against}.{all_the_same}{doubt}{distance}")
    if told[BETTER]:
        too = f" {higher} too: {rose}." if learnt else ""
        return _verdict(BETTER, f"Better than {parent}: {for_it}.{too}{doubt}{distance}")
    if learnt:
        said = f"{higher}; not shown to be better than {parent}: {rose}."
        wanted = "" if doubt else f" {INDEPENDENT}"
        return _verdict(UNSHOWN, f"{said}{doubt}{wanted}{distance}")
    return _verdict(UNCLEAR, f"Not to be told from {parent}.{doubt}{distance}")


def of_itself(section: StageSpec, before: Json, after: Json) -> str | None:
    """What a stage's own numbers show where it has risen in what it was trained on; None where it has not. Of the other
    numbers only what is right among sampled answers has an interval (ppo/held_out.py)."""
    own, what, why = {
        "ppo": ("reward", "Higher reward", "that is what it was paid by"),
        "dpo": ("preference_accuracy", "The better answer is likelier", "that is what dpo trains"),
    }.get(section.kind, ("", "", ""))
    if own not in before or own not in after or after[own] <= before[own]:
        return None
    asked = "question_accuracy" in before and "question_accuracy" in after
    change = after["question_accuracy"] - before["question_accuracy"] if asked else 0.0
    answered = f" Questions answered right {100 * change:+.0f} points.".replace("-", MINUS) if asked else ""
    truth = _truth_gain(section, after)
    if truth and truth["low"] > 0:
        return f"{what}, and more sampled answers right: {_points(truth)}.{answered}"
    if truth and truth["high"] < 0:
        return f"Over-optimised: {what.lower()}, but fewer sampled answers right: {_points(truth)}.{answered}"
    doubt = f" Within chance: sampled answers right {_points(truth)}." if truth else ""
    return f"{what}; not shown to be better: {why}.{doubt}{answered}"


def _truth_gain(section: StageSpec, after: Json) -> Json | None:
    """By how much more sampled answers are right, where the reward has a checked truth."""
    terms = section.reward_terms()
    truth = next((term for term in terms if term.truth), None)
    if truth is None:
        return None
    # A reward of one term is noted as the reward alone, times its weight.
    name, scale = (f"reward/{truth.source}_gain", 1.0) if len(terms) > 1 else ("reward_gain", truth.weight)
    if name not in after or scale <= 0:
        return None
    return {"value": after[name] / scale, "low": after[f"{name}_low"] / scale, "high": after[f"{name}_high"] / scale}


def _by(judge: str) -> str:
    return {"truth": "by the checked truth", "judge": "by the external judge"}.get(judge, f"by {judge}'s score")


def _word(low: float, high: float) -> str:
    return BETTER if low > 0 else WORSE if high < 0 else UNCLEAR


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _range(found: Json) -> str:
    return f"{100 * found['low']:.0f} to {100 * found['high']:.0f}"


def _span(change: Json) -> str:
    return f"{change['value']:+.2f}, 95 %: {change['low']:+.2f} to {change['high']:+.2f}".replace("-", MINUS).replace(
        "inf", INFINITY
    )


def _points(change: Json) -> str:
    said = f"{100 * change['value']:+.0f} points, 95 %: {100 * change['low']:+.0f} to {100 * change['high']:+.0f}"
    return said.replace("-", MINUS)


def _perplexity(loss: float) -> str:
    return f"{math.exp(min(loss, 700.0)):.1f}"

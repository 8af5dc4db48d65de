"""One sentence for each stage: better than the stage before, worse, or not to be told apart, and by how much."""

from __future__ import annotations

import math

from pipeline.artifact import Json
from pipeline.evaluate.metric import INFINITY, MINUS

BETTER, WORSE, UNCLEAR, WARNING = "better", "worse", "unclear", "warning"


def spoken(results: Json) -> Json:
    """For each stage {"word": better | worse | unclear | warning, "text": the sentence}."""
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
    """By every judge there is and by the questions: better by at least one and worse by none, or the other way round;
    what they disagree on is a warning."""
    parent, arenas = results["parents"][name], results["arenas"]
    numbers, changes = results["numbers"][name], results["changes"][name]
    told: dict[str, list[str]] = {BETTER: [], WORSE: [], UNCLEAR: []}
    for judge in sorted(arenas, key=lambda judge: {"judge": 0, "truth": 1}.get(judge, 2)):
        rate = arenas[judge]["wins"].get(name, {}).get(parent)
        if rate:
            said = f"wins {_percent(rate['value'])} ({_range(rate)}) {_by(judge)}"
            told[_word(rate["low"] - 0.5, rate["high"] - 0.5)].append(said)
    asked = [("question_accuracy", "questions answered right")]
    if not arenas:
        asked.append(("preference_accuracy", "the better answer is likelier"))
    for metric, label in asked:
        if metric in changes:
            change = changes[metric]
            told[_word(change["low"], change["high"])].append(f"{label} {_points(change)}")
    flagged = results["over_optimised"].get(name)
    if flagged and not told[BETTER]:  # the mean has risen where the win rate has not
        told[BETTER].append(f"mean reward {_span(changes['reward'])}")
    if not any(told.values()):
        return _verdict(UNCLEAR, "Nothing held out to judge it by: give it a data.test or questions.")
    distance = f" It is {numbers['kl']['value']:.1f} nats an answer away from {parent}." if "kl" in numbers else ""
    doubt = f" Within chance: {'; '.join(told[UNCLEAR])}." if told[UNCLEAR] else ""
    if told[BETTER] and told[WORSE]:
        said = "Over-optimised" if flagged else f"Better and worse than {parent}"
        for_it, against = "; ".join(told[BETTER]), "; ".join(told[WORSE])
        return _verdict(WARNING, f"{said}: {for_it}, but {against}.{doubt}{distance}")
    for word, said in ((BETTER, "Better than"), (WORSE, "Worse than")):
        if told[word]:
            return _verdict(word, f"{said} {parent}: {'; '.join(told[word])}.{doubt}{distance}")
    return _verdict(UNCLEAR, f"Not to be told from {parent}.{doubt}{distance}")


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

"""One sentence for each stage: better than the stage before, worse, or not to be told apart, and by how much."""

from __future__ import annotations

import math

from pipeline.artifact import Json
from pipeline.evaluate.metric import MINUS

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
    beats_words = found["over_words"]["low"] > 0
    more = "" if beats_words else " A bag of words is not clearly worse, so it may have learnt little but vocabulary."
    return _verdict(BETTER, text + more)


def _preference_trained(results: Json, name: str) -> Json:
    parent, arenas = results["parents"][name], results["arenas"]
    wins = {judge: held["wins"][name][parent] for judge, held in arenas.items() if name in held["wins"]}
    numbers, changes = results["numbers"][name], results["changes"][name]
    parts = [
        f"wins {_percent(rate['value'])} ({_range(rate)}) against {parent} {_by(judge)}" for judge, rate in wins.items()
    ]
    if "question_accuracy" in changes:
        parts.append(f"questions answered right {_points(changes['question_accuracy'])}")
    if "kl" in numbers:
        parts.append(f"at {numbers['kl']['value']:.1f} nats an answer from {parent}")
    detail = "; ".join(parts)
    if results["over_optimised"].get(name):
        return _verdict(
            WARNING,
            f"Over-optimised: the reward has risen while what it stands for has fallen. It {detail}.",
        )
    # The judge that is hardest to please by accident decides: a person's or model's verdict, then truth, then reward.
    deciding = next((judge for judge in ("judge", "truth", results["proxy"]) if judge in wins), None)
    if deciding is None:
        metric = "preference_accuracy" if "preference_accuracy" in changes else "question_accuracy"
        change = changes.get(metric)
        if change is None:
            return _verdict(UNCLEAR, "Nothing held out to judge it by: give it a data.test or questions.")
        word = _word(change["low"], change["high"])
    else:
        word = _word(wins[deciding]["low"] - 0.5, wins[deciding]["high"] - 0.5)
    if word == UNCLEAR and deciding == "truth" and results["proxy"] in wins:
        by_proxy = wins[results["proxy"]]
        if by_proxy["low"] > 0.5:
            return _verdict(BETTER, f"Better than {parent} by the reward, and no worse by the truth: {detail}.")
        if by_proxy["high"] < 0.5:
            return _verdict(WORSE, f"Worse than {parent} by the reward: {detail}.")
    said = {BETTER: "Better than", WORSE: "Worse than", UNCLEAR: "Not to be told from"}[word]
    return _verdict(word, f"{said} {parent}: {detail}.")


def _by(judge: str) -> str:
    return {"truth": "by the checked truth", "judge": "by the external judge"}.get(judge, f"by {judge}'s score")


def _word(low: float, high: float) -> str:
    return BETTER if low > 0 else WORSE if high < 0 else UNCLEAR


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _range(found: Json) -> str:
    return f"{100 * found['low']:.0f} to {100 * found['high']:.0f}"


def _span(change: Json) -> str:
    return f"{change['value']:+.2f}, 95 %: {change['low']:+.2f} to {change['high']:+.2f}".replace("-", MINUS)


def _points(change: Json) -> str:
    said = f"{100 * change['value']:+.0f} points, 95 %: {100 * change['low']:+.0f} to {100 * change['high']:+.0f}"
    return said.replace("-", MINUS)


def _perplexity(loss: float) -> str:
    return f"{math.exp(min(loss, 700.0)):.1f}"

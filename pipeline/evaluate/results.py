"""From what was measured item by item to numbers with intervals: each policy, each against its parent, all together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy

from pipeline.disk.atomic import Json
from pipeline.evaluate import arena, benchmarks, best_of_n, reward_check, verdicts
from pipeline.measure import intervals
from pipeline.measure.metric import Estimate

BASE = "base"
ARENA_BEST_OF = 16
NS = [1, 2, 4, 8, 16, 32, 64]
TRUTH = "truth"
Taken = dict[str, Json]


def made(taken: Taken, chain: list[Json], judged: Json | None = None) -> Json:
    """results.json. `taken`: measures by "name/subject"; `chain`: the finished stages (see evaluation.py); `judged`:
    the arena of an external judge."""
    values = {key: measure["value"] for key, measure in taken.items()}
    policies = [BASE, *(stage["name"] for stage in chain if stage["answers"])]
    parents = {stage["name"]: stage["from"] or BASE for stage in chain if stage["answers"]}
    proxy = _proxy(values)
    numbers = {policy: _numbers(values, policy, proxy) for policy in policies}
    changed = {stage: changes(values, stage, parent, proxy) for stage, parent in parents.items()}
    curve = _curve(taken, proxy)
    found: Json = {
        "chain": chain,
        "parents": parents,
        "proxy": proxy,
        "numbers": numbers,
        "few_shot": _numbers({"questions/base": values["few_shot/base"]}, BASE, proxy)
        if "few_shot/base" in values
        else None,
        "changes": changed,
        "reward_models": {
            key.partition("/")[2]: reward_check.checked(value) for key, value in values.items() if key[:6] == "pairs/"
        },
        "arenas": _arenas(values, policies, curve) | ({"judge": judged} if judged else {}),
        "best_of_n": curve,
        "steps": {stage: _steps(values, stage, proxy) for stage in parents},
        "lengths": {p: _flat(values[f"answers/{p}"]["length"]) for p in policies if f"answers/{p}" in values},
        "samples": _samples(taken, policies),
        "seconds": sum(measure["seconds"] for measure in taken.values()),
    }
    found["benchmarks"] = benchmarks.compared(values, parents)
    by_proxy = found["arenas"].get(proxy, {}).get("wins", {})
    found["over_optimised"] = {
        stage: over_optimised(changed[stage], by_proxy.get(stage, {}).get(parent)) for stage, parent in parents.items()
    }
    found["verdicts"] = verdicts.spoken(found)
    return found


def over_optimised(change: dict[str, Estimate], won: Estimate | None) -> bool:
    """Against its parent the reward has risen and a gold measure (a programmatic truth, or questions answered right)
    has fallen, both beyond chance: the reward's mistakes were learnt (arXiv 2210.10760).

    change: from its parent.  won: its win rate against the parent by the reward, which can rise beyond chance where the
    mean does not."""
    gold = [change[name] for name in ("truth", "question_accuracy") if name in change]
    risen = ("reward" in change and change["reward"].above) or (won is not None and (won.low or 0) > 0.5)
    return risen and any(found.below for found in gold)


def _numbers(values: Taken, policy: str, proxy: str | None) -> dict[str, Estimate]:
    """Every number there is of one policy."""
    found: dict[str, Estimate] = {}
    for name in ("corpus_loss", "dialogue_loss"):
        if value := values.get(f"{name}/{policy}"):
            found[name] = intervals.ratio(value["nats"], value["tokens"])
    if value := values.get(f"preferences/{policy}"):
        found["preference_accuracy"] = intervals.proportion([margin > 0 for margin in value["margins"]])
    if value := values.get(f"questions/{policy}"):
        found["question_accuracy"] = intervals.proportion(value["right"])
        found["exact_match"] = intervals.proportion(value["exact"])
        found["token_f1"] = intervals.share(value["f1"])
        found["stopped"] = intervals.proportion(value["stopped"])
    if value := values.get(f"choices/{policy}"):
        found["choice_accuracy"] = intervals.proportion(value["right"])
    if value := values.get(f"labels/{policy}"):
        found["label_accuracy"] = intervals.proportion(value["right"])
        found["label_f1"] = intervals.macro_f1(value["wanted"], value["picked"])
        found["label_commonest"] = intervals.proportion([label == _commonest(value) for label in value["wanted"]])
    if value := values.get(f"answers/{policy}"):
        for name, (pick, span) in _sampled(proxy).items():
            per_prompt = pick(value)
            if per_prompt is not None:
                found[name] = intervals.mean(per_prompt) if span is None else intervals.share(per_prompt)
    return found


def _commonest(labels: Json) -> str:
    """What a rule that does not look would answer."""
    return str(Counter(labels["wanted"]).most_common(1)[0][0])


def changes(values: Taken, stage: str, parent: str, proxy: str | None) -> dict[str, Estimate]:
    """Each number of a stage less its parent's, item by item."""
    found: dict[str, Estimate] = {}

    def both(name: str) -> tuple[Json, Json] | None:
        keys = (f"{name}/{stage}", f"{name}/{parent}")
        return (values[keys[0]], values[keys[1]]) if all(key in values for key in keys) else None

    for name in ("corpus_loss", "dialogue_loss"):
        if pair := both(name):
            found[name] = intervals.ratio_difference(pair[0]["nats"], pair[1]["nats"], pair[0]["tokens"])
    if pair := both("preferences"):
        after, before = ([margin > 0 for margin in value["margins"]] for value in pair)
        found["preference_accuracy"] = intervals.difference(after, before, span=1.0)
    for name, measure, key in (
        ("question_accuracy", "questions", "right"),
        ("exact_match", "questions", "exact"),
        ("token_f1", "questions", "f1"),
        ("stopped", "questions", "stopped"),
        ("choice_accuracy", "choices", "right"),
        ("label_accuracy", "labels", "right"),
    ):
        if pair := both(measure):
            found[name] = intervals.difference(pair[0][key], pair[1][key], span=1.0)
    if pair := both("answers"):
        for name, (pick, span) in _sampled(proxy).items():
            after, before = pick(pair[0]), pick(pair[1])
            if after is not None and before is not None and name != "kl":
                found[name] = intervals.difference(after, before, span)
    return found


def _sampled(proxy: str | None) -> dict[str, tuple[Callable[[Json], Any], float | None]]:
    """Numbers of sampled answers: how each is read from the measure as one value a prompt, and the span it can have."""

    def per_prompt(table: Any) -> Any:
        return None if table is None else numpy.asarray(table, dtype=float).mean(1)

    return {
        "reward": (lambda value: per_prompt(value["scores"].get(proxy)), None),
        "truth": (lambda value: per_prompt(value["truth"]), 1.0),
        "kl": (lambda value: per_prompt(value["kl"]), None),
        "answer_length": (lambda value: per_prompt(value["length"]), None),
        "ended": (lambda value: per_prompt(value["ended"]), 1.0),
    }


def _proxy(values: Taken) -> str | None:
    """The judge that stands for the reward: the first source by which answers were scored."""
    sampled = next((value for key, value in values.items() if key.startswith("answers/")), None)
    return next(iter(sampled["scores"]), None) if sampled else None


def _arenas(values: Taken, policies: list[str], curve: Json | None) -> Json:
    """By each judge: win rates of all against all, and Elo. best-of-n takes part as a policy of its own."""
    present = [policy for policy in policies if f"answers/{policy}" in values]
    if len(present) < 2:
        return {}
    drawn = {policy: values[f"answers/{policy}"] for policy in present}
    weights: dict[str, numpy.ndarray] = {}
    if curve:
        name, value = f"best of {ARENA_BEST_OF}", values[f"best_of_n/{curve['policy']}"]
        drawn[name] = value
        weights[name] = best_of_n.weights(numpy.asarray(value["scores"][curve["proxy"]]), ARENA_BEST_OF)
    first = drawn[present[0]]
    judges = {source: {p: numpy.asarray(v["scores"][source]) for p, v in drawn.items()} for source in first["scores"]}
    if first["truth"] is not None:
        judges[TRUTH] = {policy: numpy.asarray(value["truth"]) for policy, value in drawn.items()}
    found: Json = {}
    for judge, scores in judges.items():
        held = arena.by_score(scores, weights)
        found[judge] = described(held)
    return found


def described(held: arena.Arena) -> Json:
    """An arena as it stands in results.json."""
    names = held.names
    return {
        "names": names,
        "elo": held.elo(),
        "wins": {a: {b: held.win_rate(a, b) for b in names if b != a} for a in names},
    }


def _curve(taken: Taken, proxy: str | None) -> Json | None:
    """Best-of-n of the reference policy, with its gold measure where there is one."""
    key = next((key for key in taken if key.startswith("best_of_n/")), None)
    if key is None or proxy is None:
        return None
    value = taken[key]["value"]
    proxy_PN = numpy.asarray(value["scores"][proxy], dtype=float)
    gold_PN = None if value["truth"] is None else numpy.asarray(value["truth"], dtype=float)
    ns = [n for n in NS if n <= proxy_PN.shape[1]]
    points = [vars(point) for point in best_of_n.curve(proxy_PN, gold_PN, ns)]
    gained = None
    if gold_PN is not None:
        first, last = (best_of_n.chosen(proxy_PN, gold_PN, n) for n in (ns[0], ns[-1]))
        gained = intervals.difference(last, first, span=1.0)
    named = {"policy": key.partition("/")[2], "proxy": proxy, "prompts": len(proxy_PN)}
    return {**named, "points": points, "gold_gained": gained}


def _steps(values: Taken, stage: str, proxy: str | None) -> dict[str, dict[str, Estimate]]:
    """The numbers of a policy part of the way, by step."""
    prefix = f"answers/{stage}@"
    steps = sorted(int(key.removeprefix(prefix)) for key in values if key.startswith(prefix))
    return {str(step): _numbers(values, f"{stage}@{step}", proxy) for step in steps}


def _samples(taken: Taken, policies: list[str]) -> list[Json]:
    """Questions with every policy's greedy answer, and held-out prompts with their first sampled one. `right` is None
    where nothing checks it."""
    found: dict[str, Json] = {}
    for name in ("questions", "answers"):
        present = [policy for policy in policies if f"{name}/{policy}" in taken]
        told = {policy: taken[f"{name}/{policy}"]["value"] for policy in present}
        for i, row in enumerate(taken[f"{name}/{present[0]}"]["rows"] if present else []):
            said = {policy: _said(value, i, greedy=name == "questions") for policy, value in told.items()}
            sample = {"prompt": row["prompt"], "answer": row.get("answer"), "told": said}
            found.setdefault(json.dumps(row["prompt"]), sample)
    return list(found.values())


def _said(value: Json, i: int, greedy: bool) -> Json:
    if greedy:
        return {"text": value["text"][i], "right": value["right"][i]}
    return {"text": value["text"][i][0], "right": value["truth"][i][0] == 1 if value["truth"] else None}


def _flat(table: list[list[int]]) -> list[int]:
    return [value for row in table for value in row]

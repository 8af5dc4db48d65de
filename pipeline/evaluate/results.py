"""From what was measured item by item to numbers with intervals: each policy, each against its parent, all together."""

from __future__ import annotations

import json

import numpy

from pipeline.disk.atomic import Json
from pipeline.evaluate import arena, benchmarks, best_of_n, forgetting, reward_check, verdicts
from pipeline.evaluate.measure import Measure
from pipeline.evaluate.measures import OF_A_POLICY, Answers, BestOfN, FewShot, Pairs, Questions, proxy_of
from pipeline.evaluate.stored import Arena, Curve, Link, People, Results, Said, Sample
from pipeline.evaluate.wording import PEOPLE
from pipeline.language.say import in_english
from pipeline.measure import intervals
from pipeline.measure.metric import Estimate
from pipeline.stages.stage import BASE

ARENA_BEST_OF = 16
NS = [1, 2, 4, 8, 16, 32, 64]


def make(
    taken: list[tuple[Measure, Json]],
    chain: list[Link],
    judged: Arena | None = None,
    people: tuple[People, Arena | None] | None = None,
) -> Results:
    """What results.json holds. `taken`: every measure with its file; `judged`: the arena of an external judge;
    `people`: those who voted, and their arena."""

    def of(kind: type[Measure]) -> dict[str, Json]:
        """What was taken, by policy or reward model."""
        return {measure.subject: record["value"] for measure, record in taken if type(measure) is kind}

    values = {kind: of(kind) for kind in OF_A_POLICY}
    policies = [BASE, *(stage.name for stage in chain if stage.answers)]
    answers = {policy: values[Answers][policy] for policy in policies if policy in values[Answers]}
    parents = {stage.name: stage.parent or BASE for stage in chain if stage.answers}
    proxy = next(map(proxy_of, answers.values()), None)
    changed: dict[str, dict[str, Estimate]] = {stage: {} for stage in parents}
    numbers: dict[str, dict[str, Estimate]] = {policy: {} for policy in policies}
    for kind, known in values.items():
        for policy in (policy for policy in policies if policy in known):
            numbers[policy] |= kind.numbers(known[policy])
        for stage, parent in parents.items():
            if stage in known and parent in known:
                changed[stage] |= kind.changes(known[stage], known[parent])
    steps: dict[str, dict[str, dict[str, Estimate]]] = {stage: {} for stage in parents}
    for measure, record in taken:
        if measure.step is not None:
            steps[measure.subject][str(measure.step)] = measure.numbers(record["value"])
    many = of(BestOfN)
    curve = _curve(many, proxy)
    arenas = _arenas(answers, many if curve else {}, proxy)
    voters, voted = people or (None, None)
    won = arenas[proxy].wins if proxy in arenas else {}
    results = Results(
        chain=chain,
        parents=parents,
        proxy=proxy,
        numbers=numbers,
        few_shot=next(map(FewShot.numbers, of(FewShot).values()), None),
        changes=changed,
        reward_models={name: reward_check.check(value) for name, value in of(Pairs).items()},
        arenas=({PEOPLE: voted} if voted else {}) | arenas | ({"judge": judged} if judged else {}),
        people=voters,
        best_of_n=curve,
        steps=steps,
        lengths={policy: [n for row in value["length"] for n in row] for policy, value in answers.items()},
        samples=_samples(taken, policies),
        seconds=sum(record["seconds"] for _, record in taken),
        benchmarks=benchmarks.compared(
            [(measure.subject, record["value"]) for measure, record in taken if type(measure) is benchmarks.Benchmark],
            parents,
        ),
        over_optimised={
            stage: over_optimised(changed[stage], won.get(stage, {}).get(parent)) for stage, parent in parents.items()
        },
        forgetting=forgetting.measure(taken, chain),
    )
    with in_english():
        return results.model_copy(update={"verdicts": verdicts.find(results)})


def over_optimised(change: dict[str, Estimate], won: Estimate | None) -> bool:
    """Against its parent the reward has risen and a gold measure (a programmatic truth, or questions answered right)
    has fallen, both beyond chance: the reward's mistakes were learnt (arXiv 2210.10760).

    change: from its parent.  won: its win rate against the parent by the reward, which can rise beyond chance where the
    mean does not."""
    gold = [change[name] for name in ("truth", "question_accuracy") if name in change]
    risen = ("reward" in change and change["reward"].above) or (won is not None and (won.low or 0) > 0.5)
    return risen and any(found.below for found in gold)


def _arenas(answers: dict[str, Json], many: dict[str, Json], proxy: str | None) -> dict[str, Arena]:
    """By each judge: win rates of all against all, and Elo. best-of-n takes part as a policy of its own."""
    if len(answers) < 2:
        return {}
    first = next(iter(answers.values()))
    weights: dict[str, numpy.ndarray] = {}
    for value in many.values():
        name = f"best of {ARENA_BEST_OF}"
        answers = {**answers, name: value}
        weights[name] = best_of_n.weights(numpy.asarray(value["scores"][proxy]), ARENA_BEST_OF)
    judges = {source: {p: numpy.asarray(v["scores"][source]) for p, v in answers.items()} for source in first["scores"]}
    if first["truth"] is not None:
        judges["truth"] = {policy: numpy.asarray(value["truth"]) for policy, value in answers.items()}
    return {judge: arena.by_score(scores, weights).described() for judge, scores in judges.items()}


def _curve(many: dict[str, Json], proxy: str | None) -> Curve | None:
    """Best-of-n of the reference policy, with its gold measure where there is one."""
    if not many or proxy is None:
        return None
    ((policy, value),) = many.items()
    proxy_PN = numpy.asarray(value["scores"][proxy], dtype=float)
    gold_PN = None if value["truth"] is None else numpy.asarray(value["truth"], dtype=float)
    ns = [n for n in NS if n <= proxy_PN.shape[1]]
    points = best_of_n.curve(proxy_PN, gold_PN, ns)
    gained = None
    if gold_PN is not None:
        first, last = (best_of_n.chosen(proxy_PN, gold_PN, n) for n in (ns[0], ns[-1]))
        gained = intervals.difference(last, first, span=1.0)
    return Curve(policy=policy, proxy=proxy, prompts=len(proxy_PN), points=points, gold_gained=gained)


def _samples(taken: list[tuple[Measure, Json]], policies: list[str]) -> list[Sample]:
    """Questions with every policy's greedy answer, and held-out prompts with their first sampled one. `right` is None
    where nothing checks it."""
    found: dict[str, Sample] = {}
    for kind in (Questions, Answers):
        held = {measure.subject: record for measure, record in taken if type(measure) is kind}
        told = {policy: held[policy]["value"] for policy in policies if policy in held}
        for i, row in enumerate(held[next(iter(told))]["rows"] if told else []):
            said = {policy: _said(value, i, greedy=kind is Questions) for policy, value in told.items()}
            sample = Sample(prompt=row["prompt"], answer=row.get("answer"), told=said)
            found.setdefault(json.dumps(row["prompt"]), sample)
    return list(found.values())


def _said(value: Json, i: int, greedy: bool) -> Said:
    if greedy:
        return Said(text=value["text"][i], right=value["right"][i])
    return Said(text=value["text"][i][0], right=value["truth"][i][0] == 1 if value["truth"] else None)

"""What a page says in words beside its tables: of the run, its judges, best of n, its cost; and under each stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.disk.atomic import Json
from pipeline.evaluate.stored import Arena, Curve, Results
from pipeline.evaluate.wording import PEOPLE
from pipeline.language.say import say, say_again
from pipeline.measure.metric import QUESTION_ACCURACY, SHARE, TRUTH
from pipeline.recipe.recipe import Recipe
from pipeline.report.opening import measures
from pipeline.stages import STAGES


def judge_name(judge: str) -> str:
    if judge == PEOPLE:
        return say("people")
    if judge == "truth":
        return say("the checked truth")
    return say("the external judge") if judge == "judge" else say("the score of '{judge}'", judge=judge)


def of_the_run(recipe: Recipe, base: str, stages: int, missing: list[str], made: str) -> str:
    told = [
        say("1 stage on one frozen base, {base} ({quantize}), seed {seed}.", **_base(recipe, base))
        if stages == 1
        else say("{n} stages on one frozen base, {base} ({quantize}), seed {seed}.", n=stages, **_base(recipe, base))
    ]
    if missing:
        told.append(say("Not finished: {stages}.", stages=say(", ").join(missing)))
    return say(" ").join([*told, say("Made on {date}.", date=made)])


def _base(recipe: Recipe, base: str) -> dict[str, Any]:
    return {"base": base, "quantize": recipe.spec.model.quantize, "seed": recipe.spec.seed}


def of_the_judge(arena: Arena, file: object) -> str:
    """Of an external one. `file`: where its verdicts are kept, as the page writes it."""
    asked = say(
        "The external judge is {model}: every pair was asked in both orders, and a verdict that changed with the "
        "order is a tie.",
        model=arena.model,
    )
    unread = say("So are {n} replies that were no verdict.", n=arena.unread) if arena.unread else ""
    kept = say(
        "Each verdict, with what the judge was shown and what it replied, is in {file} of the run's folder.", file=file
    )
    return say(" ").join(filter(None, [asked, unread, kept]))


def of_the_rounds(results: Results | None) -> str:
    """What the table of rounds shows. Without an evaluation it has the votes alone."""
    told = [
        say("Round 0 is the stage whose answers the first round shows. Agreement is that of the round's own votes.")
    ]
    if results is None:
        return say(" ").join([*told, say("This run has not been evaluated: the stages' numbers are missing.")])
    if results.proxy:
        told.append(say("Every round's reward is by one judge: {judge}.", judge=judge_name(results.proxy)))
    return say(" ").join(
        [*told, say("Ranked right: each round's reward model on all pairs that are held out by then.")]
    )


def of_over_optimisation(flagged: Mapping[str, bool]) -> str:
    stages = [stage for stage, found in flagged.items() if found]
    if not stages:
        return say("No stage is found over-optimised.")
    return say("Over-optimised: {stages}.", stages=say(", ").join(stages))


def of_best_of_n(curve: Curve) -> str:
    """How much more often the answer that the reward chooses is right; "" where nothing checks it."""
    gained = curve.gold_gained
    if gained is None:
        return ""
    values = {
        "n": curve.points[-1].n,
        "points": SHARE.number(abs(gained.value)),
        "range": SHARE.range(gained, sign=True),
    }
    if gained.below:
        return say(
            "Of {n} answers the one this reward chooses is right {points} points less often than a single one, "
            "95 %: {range}: searched that hard, the reward prefers wrong answers.",
            **values,
        )
    if gained.value < 0:
        return say(
            "Of {n} answers the one this reward chooses is right {points} points less often than a single one, "
            "95 %: {range}.",
            **values,
        )
    return say(
        "Of {n} answers the one this reward chooses is right {points} points more often than a single one, "
        "95 %: {range}.",
        **values,
    )


def of_the_picture(name: str) -> str:
    """What stands for a picture where it is not seen."""
    what, _, of = name.partition("-")
    known = {
        "training": say("training of {of}", of=of),
        "path": say("the way of {of}", of=of),
        "calibration": say("calibration of {of}", of=of),
        "scores": say("scores of {of}", of=of),
        "lengths": say("lengths of answers"),
        "rounds": say("rounds of labels: {of}", of=of),
    }
    return known.get(what, name)


def of_the_cost(costs: list[Json], device: str) -> str:
    energy = next((row["energy_of"] for row in costs if row["energy"] is not None), None)
    told = say(
        "On {device}; peak memory is the {memory}. Tokens of padding not counted.",
        device=say_again(device),
        memory=say_again(costs[0]["peak_is"]),
    )
    if energy is None:
        return say(" ").join([told, say("Energy is not known: this machine shows no counter of it.")])
    return say(" ").join([told, say("Energy (Wh) is that of the {energy}.", energy=say_again(energy))])


def under_each_stage(results: Results | None) -> dict[str, str]:
    """A number under each stage of the lineage."""
    notes: dict[str, str] = {}
    for stage in results.chain if results else []:
        name, kind = stage.name, STAGES[stage.kind]
        if not kind.answers:
            headline = kind.headlines[0]
            if headline.name in stage.after:
                value = headline.written(stage.after[headline.name])
                told = say("{value} of pairs right", value=value)
                notes[name] = told if kind.ranks else say("{label} {value}", label=headline.said, value=value)
            continue
        numbers = results.numbers[name] if results else {}
        metric = next((metric for metric in measures(stage.kind) if metric.name in numbers), None)
        if metric is None:
            continue
        value = metric.written(numbers[metric.name].value)
        if metric is QUESTION_ACCURACY:
            notes[name] = say("{value} of questions right", value=value)
        elif metric is TRUTH:
            notes[name] = say("{value} sampled right", value=value)
        else:
            notes[name] = say("{label} {value}", label=metric.said, value=value)
    return notes

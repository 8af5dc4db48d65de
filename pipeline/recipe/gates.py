"""What a recipe demands of its stages before the next one may run.

expect: {sft.question_accuracy: ">= 0.6", reward.accuracy: ">= 0.7"}
expect: {ppo.forgetting.sft.question_accuracy: ">= -0.02"}     # what `onebase eval` measures, and holds
"""

from __future__ import annotations

import operator
import re
from typing import Any

from pipeline.disk.artifact import Artifact
from pipeline.errors import UserError, complaint
from pipeline.measure.metric import QUESTION_ACCURACY

Expect = dict[str, Any]
"""By "stage.number", or nested; `check` names what does not belong there."""
MEASURED = "forgetting."
"""Begins the numbers that an evaluation takes, and not the stage itself."""
COMPARISON = re.compile(r"(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)")
OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def _flatten(expect: Expect) -> dict[str, Any]:
    """By "stage.number", whether it was written that way or nested."""
    return {
        f"{key}.{below}" if below else key: comparison
        for key, value in expect.items()
        for below, comparison in (value.items() if isinstance(value, dict) else [("", value)])
    }


def check(expect: Expect, numbers: dict[str, list[str]]) -> None:
    """Raises a complaint at the first demand that cannot be understood or met.

    numbers: the held-out numbers that each stage can leave."""
    for key, comparison in _flatten(expect).items():
        stage, dot, number = key.partition(".")
        if not dot or stage not in numbers:
            example = f"{next(iter(numbers))}.loss (there is: {', '.join(numbers)})"
            raise complaint(f"name a stage and its number, as in {example}", "expect", key)
        if number not in numbers[stage]:
            problem = f"{stage} does not give this number (there is: {', '.join(numbers[stage])})"
            if number.startswith(MEASURED):
                needs = "questions:" if QUESTION_ACCURACY.name in number else "data.test"
                problem = f"{problem}. For this one the earlier stage needs {needs}"
            raise complaint(problem, "expect", key)
        if not isinstance(comparison, str) or not COMPARISON.fullmatch(comparison.strip()):
            problem = f'is {comparison!r}, expected a comparison with a number in quotes, as in ">= 0.6"'
            raise complaint(problem, "expect", key)


def hold(expect: Expect, artifact: Artifact, force: bool) -> None:
    """Raise UserError with the numbers if a finished stage misses what is expected of it; only say so with `force`."""
    stage, manifest = artifact.name, artifact.manifest()
    if manifest is None:
        return
    failures = _misses(expect, stage, manifest.after, measured=False)
    if not failures:
        return
    listed = "\n".join(failures)
    if not force:
        raise UserError(
            f"stage '{stage}' does not reach what the recipe expects, so the run stops here:\n{listed}\n"
            "Its adapter is kept. Continue all the same with --force, or change the stage or the expectation."
        )
    print(f"  warning: going on although stage '{stage}' misses what is expected:\n{listed}", flush=True)


def hold_measured(expect: Expect, numbers: dict[str, dict[str, float]]) -> None:
    """Raise UserError with the numbers if an evaluation misses what is expected of it. `numbers`: those that begin with
    MEASURED, of every finished policy."""
    failures = [line for stage, found in numbers.items() for line in _misses(expect, stage, found, measured=True)]
    if failures:
        listed = "\n".join(failures)
        raise UserError(
            f"the evaluation does not reach what the recipe expects:\n{listed}\n"
            "Its results are kept. Change the stage or the expectation."
        )


def _misses(expect: Expect, stage: str, numbers: dict[str, float], measured: bool) -> list[str]:
    """A line for each demand of a stage that its numbers do not meet, among those that are `measured` by an evaluation
    or among the others."""
    failures = []
    for key, comparison in _flatten(expect).items():
        name, _, number = key.partition(".")
        if name != stage or number.startswith(MEASURED) != measured:
            continue
        match = COMPARISON.fullmatch(comparison.strip())
        assert match is not None, "the recipe was checked when it was read"
        value = numbers.get(number)
        if value is None:
            failures.append(f"  expect.{key}: the stage has no such number (it has: {', '.join(sorted(numbers))})")
        elif not OPERATORS[match[1]](value, float(match[2])):
            failures.append(f"  expect.{key}: wanted {comparison}, found {value:.4g}")
    return failures

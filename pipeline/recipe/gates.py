"""What a recipe demands of its stages before the next one may run.

expect: {sft.question_accuracy: ">= 0.6", reward.accuracy: ">= 0.7"}
"""

from __future__ import annotations

import operator
import re
from typing import Any

from pipeline.disk.artifact import Artifact
from pipeline.disk.atomic import Json
from pipeline.errors import UserError, complaint

Expect = dict[str, Any]
"""By "stage.number", or nested; what does not belong there is named by `check`."""

COMPARISON = re.compile(r"(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)")
_HOLDS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def flat(expect: Expect) -> dict[str, Any]:
    """By "stage.number", whether it was written that way or nested."""
    return {
        f"{key}.{below}" if below else key: wanted
        for key, value in expect.items()
        for below, wanted in (value.items() if isinstance(value, dict) else [("", value)])
    }


def check(expect: Expect, numbers: dict[str, list[str]]) -> None:
    """Raises a complaint at the first demand that cannot be understood or met.

    numbers: the held-out numbers that each stage can leave."""
    names = list(numbers)
    for key, wanted in flat(expect).items():
        stage, dot, number = key.partition(".")
        if not dot or stage not in names:
            there = f"name a stage and its number, as in {names[0]}.loss (there is: {', '.join(names)})"
            raise complaint(there, "expect", key)
        if number not in numbers[stage]:
            raise complaint(f"{stage} leaves no such number (there is: {', '.join(numbers[stage])})", "expect", key)
        if not isinstance(wanted, str) or not COMPARISON.fullmatch(wanted.strip()):
            said = f'is {wanted!r}, expected a comparison with a number in quotes, as in ">= 0.6"'
            raise complaint(said, "expect", key)


def missed(expect: Expect, stage: str, after: Json) -> list[str]:
    """The demands on one stage that its held-out numbers after training do not meet, in words."""
    found = []
    for key, wanted in flat(expect).items():
        name, _, metric = key.partition(".")
        if name != stage:
            continue
        comparison = COMPARISON.fullmatch(wanted.strip())
        assert comparison is not None, "the recipe was checked when it was read"
        sign, number = comparison.groups()
        value = after.get(metric)
        if value is None:
            found.append(f"expect.{key}: the stage has no such number (it has: {', '.join(sorted(after))})")
        elif not _HOLDS[sign](value, float(number)):
            found.append(f"expect.{key}: wanted {wanted}, found {value:.4g}")
    return found


def hold(expect: Expect, artifact: Artifact, force: bool) -> None:
    """Raise UserError with the numbers if a finished stage misses what is expected of it; only say so with `force`."""
    stage, manifest = artifact.name, artifact.manifest()
    failures = missed(expect, stage, manifest.after) if manifest else []
    if not failures:
        return
    told = "\n".join(f"  {failure}" for failure in failures)
    if not force:
        raise UserError(
            f"stage '{stage}' does not reach what the recipe expects, so the run stops here:\n{told}\n"
            "Its adapter is kept. Go on all the same with --force, or change the stage or the expectation."
        )
    print(f"  warning: going on although stage '{stage}' misses what is expected:\n{told}", flush=True)

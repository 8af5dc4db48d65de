"""The card's table of held-out numbers, each with its 95 % interval."""

from __future__ import annotations

import math
from pathlib import Path

from pipeline.artifact import WEIGHTS, Json
from pipeline.errors import UserError
from pipeline.evaluate import intervals, verdicts
from pipeline.evaluation_plan import results_in, verdicts_in
from pipeline.publish.sealed import Sealed
from pipeline.stages import STAGES


def table(sealed: Sealed) -> str:
    """One line for every headline number of every stage of the lineage, in Markdown, and below what they show of stages
    that were trained on preferences."""
    lines = ["| stage | held-out number | before | after | 95 % interval |", "| --- " * 5 + "|"]
    evaluated = _evaluated(sealed.artifact.folder.parent)
    for entry in sealed.lineage:
        if entry.get("gone"):
            continue
        for headline in STAGES[entry["kind"]].headlines:
            after = entry["after"].get(headline.metric)
            if after is None:
                continue
            before, asked = entry["before"].get(headline.metric), headline.metric == "question_accuracy"
            count = entry["data"]["questions" if asked else "held_out"] or 0
            if headline.percent:
                interval = _of_share(after, count)
            elif headline.metric == "loss":
                interval = _of_loss(entry, evaluated)
            else:
                interval = _of_gain(entry["after"], headline.metric)
            values = ["" if v is None else f"{v:.1%}" if headline.percent else f"{v:.3f}" for v in (before, after)]
            lines.append(f"| {entry['stage']} | {headline.label} | {values[0]} | {values[1]} | {interval} |")
    return "\n".join([*lines, *_shown(sealed)])


def _shown(sealed: Sealed) -> list[str]:
    """Whether the stages that were trained to raise a number are better: by the run's evaluation where it is of these
    adapters, else by the numbers above."""
    evaluated = verdicts_in(sealed.artifact.folder.parent)
    lines = []
    for entry in sealed.lineage:
        if entry.get("gone") or not STAGES[entry["kind"]].raises:
            continue
        found = evaluated.get((entry["stage"], entry["files"][WEIGHTS]), {}).get("text")
        section = STAGES[entry["kind"]].section.model_validate(entry["section"])
        told = found or verdicts.of_itself(section, entry["before"], entry["after"])
        if told:
            lines += ["", f"**{entry['stage']}**: {told}"]
    return lines


def _of_share(value: float, count: int) -> str:
    if not count or not 0 <= value <= 1:
        return ""
    right = round(value * count)
    found = intervals.proportion([True] * right + [False] * (count - right))
    return f"{found.low:.1%} to {found.high:.1%} (Wilson, n = {count})"


def _of_loss(entry: Json, evaluated: Json) -> str:
    """As the stage measured it; for a stage trained before stages did, as the evaluation did, if of the same value."""
    low, high = (entry["after"].get(f"loss_{end}") for end in ("low", "high"))
    if low is None or high is None:
        found = evaluated.get(entry["stage"], {}).get(STAGES[entry["kind"]].held_out_loss, {})
        if not found or not math.isclose(found["value"], entry["after"]["loss"], rel_tol=1e-6):
            return "`onebase eval` gives it" if (entry["data"]["held_out"] or 0) > 1 else ""
        low, high = found["low"], found["high"]
    return f"{low:.3f} to {high:.3f} (bootstrap over rows, n = {entry['data']['held_out']})"


def _of_gain(after: Json, metric: str) -> str:
    gain, low, high = (after.get(f"{metric}_gain{end}") for end in ("", "_low", "_high"))
    if gain is None or low is None or high is None:
        return ""
    return f"gain {gain:+.3f}, {low:+.3f} to {high:+.3f} (bootstrap over prompts)"


def _evaluated(run: Path) -> Json:
    """The numbers of the run's evaluation by stage; none where there was none, or it is damaged."""
    try:
        return dict((results_in(run / "evaluation") or {}).get("numbers", {}))
    except UserError:
        return {}

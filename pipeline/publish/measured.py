"""The card's table of held-out numbers, each with its 95 % interval."""

from __future__ import annotations

from pipeline.disk.artifact import WEIGHTS
from pipeline.disk.manifest import Manifest
from pipeline.evaluate import preferred, verdicts
from pipeline.measure import intervals
from pipeline.measure.metric import QUESTION_ACCURACY, Estimate, Metric
from pipeline.publish.sealed import Sealed
from pipeline.stages import STAGES


def table(sealed: Sealed) -> str:
    """One line for every headline number of every stage of the lineage, in Markdown, and below what they show of stages
    that were trained on preferences."""
    lines = ["| stage | held-out number | before | after | 95 % interval |", "| --- " * 5 + "|"]
    for entry in sealed.known:
        for headline in STAGES[entry.kind].headlines:
            values = [numbers.get(headline.name) for numbers in (entry.before, entry.after)]
            if values[1] is None:
                continue
            before, after = ("" if value is None else headline.written(value, fine=True) for value in values)
            interval = _interval(entry, headline)
            lines.append(f"| {entry.stage} | {headline.label} | {before} | {after} | {interval} |")
    return "\n".join([*lines, *_shown(sealed)])


def _shown(sealed: Sealed) -> list[str]:
    """Whether the stages that were trained to raise a number are better: by the run's evaluation where it is of these
    adapters, else by the numbers above."""
    evaluated = verdicts.read(sealed.artifact.folder.parent)
    lines = []
    for entry in sealed.known:
        if not STAGES[entry.kind].raises:
            continue
        found = evaluated.get((entry.stage, entry.files[WEIGHTS]))
        section = STAGES[entry.kind].section.model_validate(entry.section)
        told = found.text if found else preferred.of_itself(section, entry.before, entry.after)
        if told:
            lines += ["", f"**{entry.stage}**: {told}"]
    return lines


def _interval(entry: Manifest, metric: Metric) -> str:
    """Of the number itself where the stage measured that, else of its gain."""
    after, held_out = entry.after, entry.data.held_out or 0
    if metric.unit == "%":
        value, count = after[metric.name], entry.data.questions if metric is QUESTION_ACCURACY else held_out
        if not count or not 0 <= value <= 1:
            return ""
        right = round(value * count)
        estimate = intervals.proportion([True] * right + [False] * (count - right))
        return f"{metric.range(estimate, fine=True)} % ({estimate.how}, n = {estimate.n})"
    own = Estimate.among(after, metric.name)
    if own and own.low is not None:
        return f"{metric.range(own, fine=True)} ({intervals.OVER_ROWS}, n = {held_out})"
    gain = Estimate.among(after, f"{metric.name}_gain", how=intervals.OVER_PROMPTS)
    if gain is None or gain.low is None:
        return ""
    written = metric.written(gain.value, sign=True, fine=True)
    return f"gain {written}, {metric.range(gain, sign=True, fine=True)} ({gain.how})"

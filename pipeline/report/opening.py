"""The first screen of a page: which stage is the best and by how much, and one picture of what every stage changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from matplotlib.ticker import MaxNLocator

from pipeline.disk.manifest import Manifest
from pipeline.evaluate.stored import Link, Results, Verdict
from pipeline.evaluate.wording import BETTER, UNCLEAR, UNSHOWN, judged_by
from pipeline.language.say import say
from pipeline.measure.metric import CORPUS_LOSS, DIALOGUE_LOSS, QUESTION_ACCURACY, SHARE, TRUTH, Estimate, Metric
from pipeline.recipe.recipe import Recipe
from pipeline.report.figures import FONT, GRID, INK, SOFT
from pipeline.stages import STAGES

WIDTH, ROW, MARGIN, LONGEST = 360, 44, 8, 11
COLOURS = {"better": "var(--better, #1b7f4d)", "worse": "var(--worse, #b3313f)", "": SOFT}


@dataclass(frozen=True)
class Change:
    """A row of the picture: from where a stage went to where it came."""

    stage: str
    note: str
    """What it goes on from, or what is measured of it where that is another number."""
    colour: str
    metric: Metric
    start: float | None
    end: Estimate
    change: Estimate | None


def measures(kind: str) -> list[Metric]:
    """What a policy is judged by on this page, the first that was taken. The same for every policy that is asked
    things, or they would seem to differ."""
    asked = [QUESTION_ACCURACY, TRUTH, DIALOGUE_LOSS, CORPUS_LOSS]
    return [CORPUS_LOSS, *asked] if STAGES[kind].every_token else asked


def best(results: Results, verdicts: Mapping[str, Verdict]) -> tuple[str, str]:
    """A heading and one or two sentences. The best stage is the last that its verdict calls better; of several on
    forked ways the one with the better number."""
    policies = {stage.name: stage for stage in results.chain if stage.answers}
    if not policies:
        name, verdict = list(verdicts.items())[-1]
        return say("{stage}: {word}", stage=name, word=word_shown(verdict.word)), verdict.text
    better = [name for name in policies if verdicts[name].word == BETTER]
    ends = [name for name in better if not any(name in _above(results, other) for other in better)]
    if not ends:
        return say("No stage is shown to be better than the base"), say("Each verdict stands below.")
    shared = next((metric for metric in measures("sft") if all(metric.name in results.numbers[n] for n in ends)), None)

    def height(name: str) -> float:
        value = results.numbers[name][shared.name].value if shared else 0.0
        return -value if shared and shared.direction == "lower" else value

    found = max(ends, key=height)
    said = [_by_how_much(results, policies[found])]
    later = [name for name in policies if found in _above(results, name)]
    level = [name for name in later if verdicts[name].word in (UNCLEAR, UNSHOWN)]
    fallen = [name for name in later if name not in level]
    if level:
        said.append(say("Not shown to be better than it: {stages}.", stages=say(", ").join(level)))
    if fallen:
        said.append(say("Worse in some way: {stages}; see the verdicts.", stages=say(", ").join(fallen)))
    return say("{stage} is the best stage", stage=found), say(" ").join(said)


def word_shown(word: str) -> str:
    """A verdict's word as a reader sees it."""
    return {
        "better": say("better"),
        "worse": say("worse"),
        "warning": say("warning"),
        "unclear": say("no clear change"),
        "unshown": say("not shown to be better"),
    }[word]


def _above(results: Results, name: str) -> list[str]:
    """The policies that one goes on from, the nearest first."""
    found = []
    while name in results.parents:
        name = results.parents[name]
        found.append(name)
    return found


def _by_how_much(results: Results, stage: Link) -> str:
    """By the first measure that shows the stage to be better than the one before it."""
    name, parent = stage.name, results.parents[stage.name]
    for metric in measures(stage.kind):
        change = results.changes[name].get(metric.name)
        if change is None or metric.word(change) != BETTER:
            continue
        before, after = results.numbers[parent][metric.name], results.numbers[name][metric.name]
        values = {
            "value": metric.written(after.value),
            "range": metric.range(after),
            "before": metric.written(before.value),
            "parent": parent,
        }
        if metric is QUESTION_ACCURACY:
            return say(
                "It answers {value} of {n} held-out questions right (95 %: {range}). {parent}, from which it goes on, "
                "answers {before}.",
                n=after.n,
                **values,
            )
        return say(
            "{label}, on held-out data: {value} (95 %: {range}). {parent}, from which it goes on, has {before}.",
            label=metric.heading[0].upper() + metric.heading[1:],
            **values,
        )
    for judge, arena in results.arenas.items():
        rate = arena.wins.get(name, {}).get(parent)
        if rate and judge not in stage.own_judges and (rate.low or 0) > 0.5:
            return say(
                "It wins {rate} of the comparisons with {parent} {by} (95 %: {range}).",
                rate=SHARE.written(rate.value),
                parent=parent,
                by=judged_by(judge),
                range=SHARE.range(rate),
            )
    return results.verdicts[name].text


def changes(results: Results, colours: dict[str, str]) -> list[Change]:
    """Of an evaluated run, all by one number; a reward model by the pairs it ranks right, if that number is a share."""
    known = list(results.numbers.values())
    asked = measures("sft")
    metric = next((metric for metric in asked if sum(metric.name in numbers for numbers in known) > 1), None)
    rows = []
    for stage in results.chain:
        name, parent = stage.name, results.parents.get(stage.name, "")
        end, start = (results.numbers.get(policy, {}) for policy in (name, parent))
        if metric and metric.name in end:
            before = start[metric.name].value if metric.name in start else None
            note = say("from {parent}", parent=shorten(parent, LONGEST))
            change = results.changes[name].get(metric.name)
            rows.append(Change(name, note, colours[name], metric, before, end[metric.name], change))
        elif name in results.reward_models and (metric is None or metric.unit == "%"):
            found = results.reward_models[name]
            rule, over = max(
                ((found.bag_of_words, found.over_words), (found.longer_wins, found.over_longer)),
                key=lambda pair: pair[0].value,
            )
            note = say("ranked right")
            rows.append(Change(name, note, colours[name], SHARE, rule.value, found.accuracy, over))
    return rows


def own_changes(recipe: Recipe, finished: Mapping[str, Manifest], colours: dict[str, str]) -> list[Change]:
    """Of a run that has not been evaluated: the first share among the numbers that each stage took of itself, where it
    can be one that the stage was not trained to raise."""
    rows = []
    for name, manifest in finished.items():
        kind = recipe.kind(name)
        shares = [metric for metric in kind.headlines if metric.unit == "%" and metric.name in manifest.after]
        if metric := next(iter(sorted(shares, key=lambda metric: metric.name == kind.raises)), None):
            end = Estimate.among(manifest.after, metric.name)
            assert end is not None
            start = manifest.before.get(metric.name)
            change = None if start is None else Estimate(end.value - start, None, None, 0, "")
            rows.append(Change(name, metric.said, colours[name], metric, start, end, change))
    return rows


def caption(rows: list[Change]) -> str:
    """What the picture shows, in one line."""
    labels = {row.metric.heading for row in rows if row.metric is not SHARE}
    if len(labels) == 1:
        return say("What each stage changed: {label}", label=labels.pop())
    return say("What each stage changed, on held-out data")


def drawn(rows: list[Change], title: str) -> str | None:
    """An SVG: for each stage a hollow point where it began, a full one where it ended, and the 95 % interval of that.
    It is narrow, so that its words can be read on a phone."""
    if not rows:
        return None
    values = [value for row in rows for value in (row.start, row.end.value, row.end.low, row.end.high)]
    known = [value for value in values if value is not None]
    share = rows[0].metric.unit == "%"
    ticks = [0, 0.25, 0.5, 0.75, 1] if share else list(MaxNLocator(4).tick_values(min(known), max(known)))
    low, high = ticks[0], ticks[-1]

    def at(value: float) -> float:
        return MARGIN + (value - low) / (high - low) * (WIDTH - 2 * MARGIN)

    bottom = len(rows) * ROW + 4
    parts = []
    for tick in ticks:
        written = rows[0].metric.written(tick) if share else f"{tick:g}"
        anchor = "start" if tick == low else "end" if tick == high else "middle"
        x = {"start": 0, "end": WIDTH}.get(anchor, at(tick))
        parts.append(f'<path d="M{at(tick):.1f} 4V{bottom}" stroke="{GRID}"/>')
        parts.append(_text(x, bottom + 16, written, SOFT, 11, anchor))
    for place, row in enumerate(rows):
        top = place * ROW
        told = row.metric.written(row.end.value)
        shade = SOFT
        if row.change:
            told = say("{value}, {change}", value=told, change=row.metric.shown(row.change, sign=True))
            shade = COLOURS[row.metric.word(row.change)]
        parts.append(
            f'<text x="{MARGIN}" y="{top + 18}" font-size="12.5" fill="{INK}"><tspan font-weight="700">'
            f'{escape(shorten(row.stage, LONGEST))}</tspan><tspan dx="5" font-size="11" fill="{SOFT}">'
            f"{escape(row.note)}</tspan></text>"
        )
        parts.append(_text(WIDTH - MARGIN, top + 18, told, shade, 11, "end"))
        y, end = top + 31, at(row.end.value)
        if row.end.low is not None and row.end.high is not None:
            parts.append(
                f'<path d="M{at(row.end.low):.1f} {y}H{at(row.end.high):.1f}" stroke="{row.colour}" stroke-width="9" '
                'opacity="0.28"/>'
            )
        if row.start is not None:
            start = at(row.start)
            parts.append(f'<path d="M{start:.1f} {y}H{end:.1f}" stroke="{row.colour}" stroke-width="2"/>')
            parts.append(
                f'<circle cx="{start:.1f}" cy="{y}" r="4" fill="var(--paper, #fff)" stroke="{row.colour}" '
                'stroke-width="2"/>'
            )
        parts.append(f'<circle cx="{end:.1f}" cy="{y}" r="5.5" fill="{row.colour}"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 22}" role="img" '
        f'aria-label="{escape(title)}" font-family="{FONT}">{"".join(parts)}</svg>'
    )


def shorten(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _text(x: float, y: float, words: str, fill: str, size: float, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>'
    )

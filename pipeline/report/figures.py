"""The pictures of a report as SVG text: same numbers, same bytes."""

from __future__ import annotations

import io
import math
import re
import warnings
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pipeline.disk.atomic import Json
from pipeline.evaluate.stored import Arena, Curve, Numbers
from pipeline.label.rounds import Round
from pipeline.language.say import say
from pipeline.measure.calibration import Bin
from pipeline.measure.metric import Metric

ADAPTS = {
    "#1d232b": "var(--ink, #1d232b)",
    "#3c434d": "var(--ink, #3c434d)",
    "#59616c": "var(--soft, #59616c)",
    "#9aa1ab": "var(--faint, #9aa1ab)",
    "#e7eaee": "var(--line, #e7eaee)",
}
"""The greys of STYLE as the page's own, which are others where the page is dark."""
INK, SOFT, FAINT, GRID = (ADAPTS[shade] for shade in ("#1d232b", "#59616c", "#9aa1ab", "#e7eaee"))
FONT = "system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
STYLE: Any = {
    # Identifiers inside an SVG are drawn at random unless they are salted with something fixed.
    "svg.hashsalt": "onebase",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so text is measured alike everywhere
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa1ab",
    "axes.labelcolor": "#3c434d",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": "#59616c",
    "ytick.color": "#59616c",
    "text.color": "#1d232b",
    "axes.grid": True,
    "grid.color": "#e7eaee",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 9,
}
BASE, BEST = "#8b929c", "#7757a8"
"""The colours of the base and of the best of n answers; a stage has its own."""
WIDTH, HEIGHT = 4.5, 2.9


def colour(name: str, colours: dict[str, str]) -> str:
    """Of a policy."""
    return BEST if name.startswith("best of") else colours.get(name, BASE)


def training(name: str, rows: list[Json], shade: str) -> str | None:
    """What a stage's trainer logged: the loss, or where it samples the score of its answers, with KL below."""
    sampled = [("score", say("mean score of a step's answers")), ("kl", say("KL, nats an answer"))]
    keys = [pair for pair in sampled if any(pair[0] in row for row in rows)]
    keys = keys or [pair for pair in [("loss", say("training loss"))] if any("loss" in row for row in rows)]
    if not keys:
        return None
    figure = _figure(height=HEIGHT)
    for place, (key, label) in enumerate(keys):
        axes = figure.add_subplot(len(keys), 1, place + 1)
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), color=shade, marker="o", markersize=2.5, linewidth=1.4)
        axes.set_ylabel(say("score") if key == "score" else "KL" if key == "kl" else say("loss"))
        axes.set_title(say("{stage}: {title}", stage=name, title=label) if not place else label)
    axes.set_xlabel(say("step"))
    return _svg(figure)


def path(name: str, rows: list[Json], shade: str) -> str | None:
    """The way a policy that samples took in training: the mean score of each step's answers against their KL."""
    points = [(row["kl"], row["score"], row["step"]) for row in rows if "kl" in row and "score" in row]
    if len(points) < 2:
        return None
    figure = _figure()
    axes = figure.add_subplot()
    kl, score, _ = zip(*points, strict=True)
    axes.plot(kl, score, color=shade, marker="o", markersize=3, linewidth=1)
    for at, value, step in (points[0], points[-1]):
        axes.annotate(
            say("step {step}", step=step), (at, value), xytext=(4, 5), textcoords="offset points", fontsize=8.5
        )
    axes.set_xlabel(say("KL from the reference, nats an answer"))
    axes.set_ylabel(say("score in training"))
    axes.set_title(say("{stage}: reward against KL, step by step", stage=name))
    return _svg(figure)


def reliability(curve: list[Bin], ece: float, shade: str) -> str:
    """How often a reward model is right against how sure it is."""
    figure = _figure()
    axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], color="#9aa1ab", linestyle="--", linewidth=1, label=say("perfectly calibrated"))
    confidence, accuracy = [b.confidence for b in curve], [b.accuracy for b in curve]
    axes.plot(confidence, accuracy, color=shade, marker="o", label=say("held-out pairs"))
    for found in curve:
        place = (found.confidence, found.accuracy)
        axes.annotate(f"{found.n}", place, xytext=(5, -11), textcoords="offset points", fontsize=8.5)
    axes.set_xlabel(say("confidence of the model, sigmoid of the margin"))
    axes.set_ylabel(say("share ranked right"))
    axes.set_ylim(min(0.45, min(accuracy) - 0.08), 1.05)
    axes.set_title(say("Calibration: error {error} (pairs beside the points)", error=f"{ece:.2f}"))
    axes.legend(loc="upper left")
    return _svg(figure)


def scores(chosen: list[float], rejected: list[float]) -> str:
    """Where the scores of the better and of the worse answers lie."""
    figure = _figure()
    axes = figure.add_subplot()
    low, high = min([*chosen, *rejected]), max([*chosen, *rejected])
    width = (high - low) / 24 or 1.0
    edges = [low + place * width for place in range(25)]
    for values, label, shade in ((chosen, say("chosen"), "#21867a"), (rejected, say("rejected"), "#c43d54")):
        axes.hist(values, bins=edges, color=shade, alpha=0.55, label=label)
    axes.set_xlabel(say("score"))
    axes.set_ylabel(say("answers"))
    axes.set_title(say("Scores of held-out answers"))
    axes.legend()
    return _svg(figure)


def overoptimisation(
    curve: Curve,
    policies: dict[str, Numbers],
    steps: dict[str, dict[str, Numbers]],
    measure: str,
    label: str,
    colours: dict[str, str],
) -> str:
    """A measure against the distance from the policy that preference training started from. `policies`: for each its
    numbers, of which those with a KL are drawn. `steps`: for some of them their numbers part of the way, by step."""
    figure = _figure()
    axes = figure.add_subplot()
    key = "proxy" if measure == "reward" else "gold"
    points = [(point, known) for point in curve.points if (known := getattr(point, key))]
    kl = [point.kl for point, _ in points]
    axes.plot(kl, [known.value for _, known in points], color=BEST, marker="o", markersize=3.5, label=say("best of n"))
    axes.fill_between(
        kl, [known.low for _, known in points], [known.high for _, known in points], color=BEST, alpha=0.14, lw=0
    )
    for point, known in points[:: max(1, len(points) - 1)]:
        place = (point.kl, known.value)
        axes.annotate(f"n={point.n}", place, xytext=(4, -12), textcoords="offset points", fontsize=8.5)
    for name, numbers in policies.items():
        if "kl" in numbers and measure in numbers:
            found, at = numbers[measure], max(numbers["kl"].value, 0.0)
            shade = colour(name, colours)
            axes.errorbar([at], [found.value], yerr=found.arms, fmt="D", capsize=3, color=shade, label=name)
            way = [(max(part["kl"].value, 0.0), part[measure].value) for part in steps.get(name, {}).values()]
            if way:
                start = (kl[0], points[0][1].value)  # the best of one is the policy they started from
                axes.plot(*zip(start, *way, (at, found.value), strict=True), color=shade, linewidth=1, alpha=0.7)
                axes.plot(*zip(*way, strict=True), color=shade, marker="o", markersize=3.5, linestyle="")
    axes.set_xlabel(say("KL from {policy}, nats an answer", policy=curve.policy))
    axes.set_ylabel(label)
    axes.set_title(say("{label} against KL", label=label[0].upper() + label[1:]))
    axes.legend(loc="best")
    return _svg(figure)


def samples_needed(curve: Curve) -> str | None:
    """Accuracy against the number of answers drawn at test time."""
    points = [point for point in curve.points if point.gold]
    if not points:
        return None
    figure = _figure()
    axes = figure.add_subplot()
    n = [point.n for point in points]
    for key, label, shade in (
        ("coverage", say("at least one of n is right"), "#4c7fc4"),
        ("gold", say("the one the reward chooses is right"), BEST),
    ):
        axes.plot(
            n, [100 * getattr(p, key).value for p in points], marker="o", markersize=3.5, color=shade, label=label
        )
        low, high = ([100 * getattr(getattr(p, key), end) for p in points] for end in ("low", "high"))
        axes.fill_between(n, low, high, color=shade, alpha=0.14, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(n, [str(value) for value in n])
    axes.set_ylim(0, 105)
    axes.set_xlabel(say("answers drawn (n)"))
    axes.set_ylabel(say("% of prompts"))
    axes.set_title(say("Accuracy against test-time samples"))
    axes.legend(loc="lower right")
    return _svg(figure)


def lengths(by_policy: dict[str, list[int]], colours: dict[str, str]) -> str:
    """How long sampled answers are, one histogram a policy on a shared axis."""
    figure = _figure(height=0.8 + 0.5 * len(by_policy))
    longest = max(max(values) for values in by_policy.values())
    step = max(1, math.ceil(longest / 32))
    edges = [place - 0.5 for place in range(0, longest + step + 1, step)]
    first = None
    for place, (name, values) in enumerate(by_policy.items()):
        axes = figure.add_subplot(len(by_policy), 1, place + 1, sharex=first)
        first = first or axes
        axes.hist(values, bins=edges, color=colour(name, colours), alpha=0.8)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.tick_params(labelbottom=place == len(by_policy) - 1)
    figure.axes[0].set_title(say("Lengths of sampled answers"))
    figure.axes[-1].set_xlabel(say("answer length, tokens"))
    return _svg(figure)


def row_lengths(stages: Json, colours: dict[str, str]) -> str:
    """How many tokens training rows have, one histogram a stage in powers of two; a line where max_length cuts."""
    shown = {name: stage["tokens"] for name, stage in stages.items() if stage["tokens"]["histogram"]}
    figure = _figure(height=0.7 + 0.55 * len(shown))
    first = None
    for place, (name, tokens) in enumerate(shown.items()):
        axes = figure.add_subplot(len(shown), 1, place + 1, sharex=first)
        first = first or axes
        powers = [math.log2(edge) - 0.5 for edge, _ in tokens["histogram"]]
        axes.bar(powers, [count for _, count in tokens["histogram"]], 0.9, color=colour(name, colours), alpha=0.8)
        if tokens["max_length"]:
            axes.axvline(math.log2(tokens["max_length"]), color="#59616c", linestyle="--", linewidth=1)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.tick_params(labelbottom=place == len(shown) - 1)
    ticks = range(math.ceil(figure.axes[0].get_xlim()[0]), math.floor(figure.axes[0].get_xlim()[1]) + 1)
    figure.axes[-1].set_xticks(list(ticks), [str(2**tick) for tick in ticks])
    figure.axes[-1].set_xlabel(say("row length, tokens (dashed: max_length)"))
    return _svg(figure)


def elo(arena: Arena, title: str, colours: dict[str, str]) -> str:
    """Strengths with their intervals, the strongest on top."""
    order = sorted(arena.elo, key=lambda name: arena.elo[name].value)
    figure = _figure(height=0.9 + 0.3 * len(order))
    axes = figure.add_subplot()
    for place, name in enumerate(order):
        found = arena.elo[name]
        axes.errorbar([found.value], [place], xerr=found.arms, fmt="o", capsize=3, color=colour(name, colours))
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.set_xlabel(say("Elo (mean 1000), 95 % interval"))
    axes.set_title(title)
    return _svg(figure)


def rounds(found: list[Round], metric: Metric) -> str | None:
    """A measure of the rounds against the labels spent so far; None where fewer than two rounds have it."""
    points = [(one.so_far, one.numbers[metric.name]) for one in found if metric.name in one.numbers]
    if len(points) < 2:
        return None
    figure = _figure(height=1.9)
    axes = figure.add_subplot()
    scale = 100 if metric.unit == "%" else 1
    axes.plot([at for at, _ in points], [scale * number.value for _, number in points], color=BEST, linewidth=1)
    for at, number in points:
        known = number.scaled(scale)
        axes.errorbar([at], [known.value], yerr=known.arms, fmt="o", capsize=3, color=BEST)
    axes.set_xticks([one.so_far for one in found])
    axes.set_xlabel(say("labels so far"))
    axes.set_title(f"{metric.said}, %" if metric.unit == "%" else metric.heading)
    return _svg(figure)


def _figure(height: float = HEIGHT) -> Figure:
    matplotlib.rcParams.update(STYLE)
    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")


def _svg(figure: Figure) -> str:
    """The figure alone, without sizes that a page cannot scale and without names that a second figure would repeat."""
    buffer = io.StringIO()
    # The reader's browser draws the letters: that DejaVu lacks Chinese ones does not matter here.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", FONT, text)
    text = re.sub("|".join(ADAPTS), lambda found: ADAPTS[found[0]], text)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL).strip()

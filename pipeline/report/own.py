"""What the stages of a run measured of themselves, as the page has it: numbers, tables, cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.disk import metrics
from pipeline.disk.atomic import Json
from pipeline.disk.manifest import Manifest, Table
from pipeline.evaluate import preferred
from pipeline.language.say import say
from pipeline.measure.metric import Estimate, Metric
from pipeline.recipe.recipe import Recipe


def before_after(recipe: Recipe, finished: dict[str, Manifest]) -> list[Json]:
    """The numbers every stage takes of itself, for a run that has not been evaluated."""
    rows = []
    for name, manifest in finished.items():
        for headline in recipe.kind(name).headlines:
            if headline.name in manifest.after:
                before = manifest.before.get(headline.name)
                rows.append(
                    {
                        "stage": name,
                        "label": headline.said,
                        "before": "" if before is None else headline.written(before, fine=True),
                        "after": _with_range(headline, manifest.after),
                    }
                )
    return rows


def tables(recipe: Recipe, finished: dict[str, Manifest], evaluated: bool) -> list[tuple[str, Table]]:
    """What stages tell of their held-out rows. Of an evaluated run also the numbers of a stage that no measure is taken
    of, as it answers nothing and ranks nothing."""
    found: list[tuple[str, Table]] = []
    for name, manifest in finished.items():
        kind = recipe.kind(name)
        rows = [
            [row["label"], row["before"], row["after"]] for row in before_after(recipe, {name: manifest}) if evaluated
        ]
        if rows and not kind.answers and not kind.ranks:
            found.append(
                (name, Table(title=say("numbers"), columns=[say("held out"), say("before"), say("after")], rows=rows))
            )
        found += [(name, table) for table in manifest.tables]
    return found


def _with_range(metric: Metric, numbers: Mapping[str, float]) -> str:
    """A stage's own number, with its interval where the stage measured one."""
    found = Estimate.among(numbers, metric.name)
    interval = metric.range(found, fine=True) if found else ""
    written = metric.written(numbers[metric.name], fine=True)
    return say("{number} ({interval})", number=written, interval=interval) if interval else written


def of_itself(recipe: Recipe, finished: dict[str, Manifest]) -> dict[str, str]:
    """What the stages' own numbers show of those that were trained on preferences."""
    told = {
        name: preferred.of_itself(recipe.stages[name], manifest.before, manifest.after)
        for name, manifest in finished.items()
    }
    return {name: text for name, text in told.items() if text}


def cost(name: str, manifest: Manifest, recipe: Recipe, runs: Path) -> Json:
    counts = manifest.data.counts
    tokens = max((row.get("num_tokens", 0) for row in metrics.read(recipe.artifact(name, runs).metrics)), default=0)
    seconds = counts.get("train_seconds")
    return {
        "stage": name,
        "seconds": manifest.seconds,
        "train_seconds": seconds,
        "steps": counts.get("steps"),
        "tokens": int(tokens),
        "speed": round(tokens / seconds) if seconds and tokens else None,
        "energy": manifest.energy_wh,
        "energy_of": manifest.energy_of,
        "peak": manifest.peak_memory_mib,
        "peak_is": manifest.peak_memory_is,
    }

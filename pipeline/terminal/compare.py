"""What differs between two runs: their recipes, their data, and their numbers, item by item where both were asked the
same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.disk.artifact import Artifact
from pipeline.disk.atomic import read_json
from pipeline.disk.manifest import Manifest
from pipeline.errors import UserError
from pipeline.evaluate.measures import OF_A_POLICY
from pipeline.evaluate.plan import plan
from pipeline.evaluate.stored import Results, read_results
from pipeline.measure.metric import METRICS, SHARE, Estimate
from pipeline.recipe import yaml
from pipeline.recipe.recipe import read


def show(first: Path, second: Path, console: Console) -> None:
    """Print everything in which two run folders differ. Raises UserError if one of them is no run."""
    for folder in (first, second):
        if not os.path.isfile(folder / "recipe.yaml"):
            raise UserError(
                f"{folder} is not the folder of a run (it has no recipe.yaml). Name folders such as runs/quickstart"
            )
    trees = [yaml.load(folder / "recipe.yaml")[0] for folder in (first, second)]
    console.print(Text(f"A = {first}\nB = {second}", style="bold"))
    _table(console, "recipe", "key", [(key, *pair) for key, pair in _differences(trees[0], trees[1]).items()])
    manifests = [
        {name: Artifact(folder / name).manifest() for name in trees[i]["stages"]}
        for i, folder in enumerate((first, second))
    ]
    sources = [_sources(held) for held in manifests]
    _table(console, "data (rows used, and the files' sha256)", "file", _unlike(*sources))
    _show_numbers(first, second, manifests, console)


def _show_numbers(first: Path, second: Path, manifests: list[dict[str, Manifest | None]], console: Console) -> None:
    evaluated = [read_results(folder / "evaluation") for folder in (first, second)]
    a, b = evaluated
    if a is None or b is None:
        missing = [str(folder) for folder, found in zip((first, second), evaluated, strict=True) if found is None]
        rows = _unlike(*(_after(held) for held in manifests))
        _table(console, "numbers the stages took of themselves", "number", rows)
        told = " and ".join(missing)
        console.print(
            f"Not evaluated, so there are no intervals (onebase eval): {told}", highlight=False, soft_wrap=True
        )
        return
    for folder, results in ((first, a), (second, b)):
        if old := older(folder, results):
            console.print(
                Text(f"The evaluation of {folder} is older than the run ({old}): onebase eval", style="yellow"),
                soft_wrap=True,
            )
    for name in dict.fromkeys([*a.numbers, *b.numbers]):
        if (name in a.numbers) != (name in b.numbers):
            console.print(f"{name}: evaluated in {'A' if name in a.numbers else 'B'} alone", highlight=False)
    columns = ("stage", "number", "A (95 %)", "B (95 %)", "B less A, item by item (95 %)")
    table = Table(*columns, title="numbers", title_justify="left")
    for stage in [name for name in a.numbers if name in b.numbers]:
        paired = _paired(first, second, stage)
        name = stage
        for metric in METRICS:
            before, after = a.numbers[stage].get(metric.name), b.numbers[stage].get(metric.name)
            if before is None or after is None or before == after:
                continue
            change = paired.get(metric.name)
            style = {"better": "green", "worse": "red"}.get(metric.word(change), "") if change else ""
            cell = Text(metric.shown(change, sign=True), style=style) if change else Text("other items", style="dim")
            table.add_row(name, metric.heading, metric.shown(before), metric.shown(after), cell)
            name = ""
    console.print(table if table.row_count else "numbers: equal")
    for name in [name for name in a.reward_models if name in b.reward_models]:
        models = [results.reward_models[name] for results in (a, b)]
        shown = [
            {
                "pairs ranked right": SHARE.shown(model.accuracy),
                'over "longer wins"': SHARE.shown(model.over_longer, sign=True),
                "calibration error": f"{model.ece:.2f}",
            }
            for model in models
        ]
        _table(console, f"reward model {name}", "number", _unlike(*shown))


def older(folder: Path, results: Results) -> str:
    """Why an evaluation is not of the run as it stands, where that can be told."""
    try:
        recipe = read(folder / "recipe.yaml")
        if recipe.name != folder.resolve().name:
            return ""
        wanted = plan(recipe, folder.resolve().parent)
    except UserError as error:
        return "" if "no such file" in str(error) else str(error)
    return next((m.file for m in wanted if results.made_of.get(m.file) != m.fingerprint), "")


def _paired(first: Path, second: Path, stage: str) -> dict[str, Estimate]:
    """What changed from the first run to the second in one stage's numbers, where both were asked the same rows."""
    found: dict[str, Estimate] = {}
    for kind in OF_A_POLICY:
        a, b = (read_json(folder / "evaluation" / kind(stage, []).file) for folder in (first, second))
        if a and b and a["rows"] == b["rows"]:
            found |= kind.changes(b["value"], a["value"])
    return found


def _differences(a: Any, b: Any, prefix: str = "") -> dict[str, tuple[str, str]]:
    """Dotted keys whose values differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        found: dict[str, tuple[str, str]] = {}
        for key in dict.fromkeys([*a, *b]):
            found |= _differences(a.get(key), b.get(key), f"{prefix}{key}.")
        return found
    return {} if a == b else {prefix.rstrip("."): (_short(a), _short(b))}


def _sources(manifests: dict[str, Manifest | None]) -> dict[str, str]:
    """Per stage and role of a file: how many rows were used, and its hash."""
    found = {}
    for stage, manifest in manifests.items():
        if manifest is None:
            continue
        found[f"{stage} base"] = f"{str(manifest.parts.model['base'])[:24]}, in {manifest.dtype}"
        used = {source.path: f"{source.used} rows, " for source in manifest.data.sources}
        named = {**manifest.section["data"], "questions": manifest.section.get("questions")}
        for role, sha256 in manifest.data_hashes.items():
            found[f"{stage} {role}"] = f"{used.get(str(named.get(role)), '')}{str(sha256)[:12]}"
    return found


def _after(manifests: dict[str, Manifest | None]) -> dict[str, str]:
    return {
        f"{stage} {key}": f"{value:.4g}"
        for stage, manifest in manifests.items()
        for key, value in (manifest.after if manifest else {}).items()
    }


def _unlike(a: dict[str, str], b: dict[str, str]) -> list[tuple[str, str, str]]:
    return [(key, a.get(key, ""), b.get(key, "")) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]


def _table(console: Console, title: str, what: str, rows: list[tuple[str, str, str]]) -> None:
    if not rows:
        console.print(f"{title}: equal", highlight=False)
        return
    table = Table(title=title, title_justify="left")
    for heading in (what, "A", "B"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

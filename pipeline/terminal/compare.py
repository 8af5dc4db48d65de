"""What differs between two runs: their recipes, their data, and their numbers, item by item where both were asked the
same."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.disk.artifact import Artifact
from pipeline.disk.atomic import Json, read_json
from pipeline.disk.manifest import Manifest
from pipeline.errors import UserError
from pipeline.evaluate.measures import OF_A_POLICY
from pipeline.evaluate.plan import plan
from pipeline.evaluate.stored import Results, RewardModel, read_results
from pipeline.language.say import say
from pipeline.measure.metric import METRICS, SHARE, Estimate
from pipeline.recipe import yaml
from pipeline.recipe.recipe import read
from pipeline.terminal.console import Row, counted, print_matrix, print_rows

Pair = tuple[Any, Any]
"""Of the first run and of the second."""


@dataclass(frozen=True)
class Change:
    """A number of a stage that both runs have. `change`: from A to B over the same items, where these are the same."""

    a: Estimate
    b: Estimate
    change: Estimate | None


@dataclass(frozen=True)
class Difference:
    a: Path
    b: Path
    recipe: dict[str, Pair]
    """By dotted key, the values that are not equal."""
    data: dict[str, Pair]
    """By stage and role, the files that are not equal: rows used and sha256."""
    after: dict[str, Pair]
    """By stage and name, the numbers that the stages took of themselves and that are not equal."""
    evaluated: Pair
    """Whether each run has been."""
    older: Pair
    """Why an evaluation is not of its run as it stands; empty where it is."""
    numbers: dict[str, dict[str, Change]]
    """Of the evaluations, by stage and metric."""
    alone: dict[str, str]
    """Stages that were evaluated in one run alone, and in which."""
    reward_models: dict[str, tuple[RewardModel, RewardModel]]


def compare(first: Path, second: Path) -> Difference:
    """Everything in which two run folders differ. Raises UserError if one of them is no run."""
    for folder in (first, second):
        if not os.path.isfile(folder / "recipe.yaml"):
            raise UserError(
                f"{folder} is not the folder of a run (it has no recipe.yaml). Name folders such as runs/quickstart"
            )
    trees = [yaml.load(folder / "recipe.yaml")[0] for folder in (first, second)]
    manifests = [
        {name: Artifact(folder / name).manifest() for name in trees[i]["stages"]}
        for i, folder in enumerate((first, second))
    ]
    evaluated = [read_results(folder / "evaluation") for folder in (first, second)]
    a, b = evaluated
    numbers: dict[str, dict[str, Change]] = {}
    alone: dict[str, str] = {}
    if a and b:
        alone = {name: "A" for name in a.numbers if name not in b.numbers}
        alone |= {name: "B" for name in b.numbers if name not in a.numbers}
        for stage in [name for name in a.numbers if name in b.numbers]:
            paired, own, other = _paired(first, second, stage), a.numbers[stage], b.numbers[stage]
            both = [metric.name for metric in METRICS if metric.name in own and metric.name in other]
            numbers[stage] = {name: Change(own[name], other[name], paired.get(name)) for name in both}
    models = {name: (a.reward_models[name], b.reward_models[name]) for name in _both(a, b)} if a and b else {}
    return Difference(
        first,
        second,
        recipe=_differences(trees[0], trees[1]),
        data=_unlike(*(_sources(held) for held in manifests)),
        after=_unlike(*(_after(held) for held in manifests)),
        evaluated=(a is not None, b is not None),
        older=(older(first, a) if a else "", older(second, b) if b else ""),
        numbers=numbers,
        alone=alone,
        reward_models=models,
    )


def show(found: Difference, console: Console) -> None:
    folders = (found.a, found.b)
    console.print(Text(f"A = {found.a}\nB = {found.b}", style="bold"), soft_wrap=True)
    _table(console, say("recipe"), say("key"), {key: (_short(a), _short(b)) for key, (a, b) in found.recipe.items()})
    files = {key: (_file(a), _file(b)) for key, (a, b) in found.data.items()}
    _table(console, say("data (rows used, and the files' sha256)"), say("file"), files)
    if not all(found.evaluated):
        own = {key: (_rounded(a), _rounded(b)) for key, (a, b) in found.after.items()}
        _table(console, say("numbers the stages took of themselves"), say("number"), own)
        missing = [str(folder) for folder, done in zip(folders, found.evaluated, strict=True) if not done]
        runs = say(", ").join(missing)
        console.print(
            say("Not evaluated, so there are no intervals (onebase eval): {runs}", runs=runs),
            markup=False,
            soft_wrap=True,
        )
        return
    for folder, old in zip(folders, found.older, strict=True):
        if old:
            told = say("The evaluation of {run} is older than the run ({why}): onebase eval", run=folder, why=old)
            console.print(Text(told, style="yellow"), soft_wrap=True)
    for name, run in found.alone.items():
        console.print(say("{stage}: evaluated only in {run}", stage=name, run=run), markup=False)
    _show_numbers(found, console)
    for name, models in found.reward_models.items():
        shown = [
            {
                say("pairs ranked right"): SHARE.shown(model.accuracy),
                say('over "longer wins"'): SHARE.shown(model.over_longer, sign=True),
                say("calibration error"): f"{model.ece:.2f}",
            }
            for model in models
        ]
        _table(console, say("reward model {name}", name=name), say("number"), _unlike(*shown))


def _show_numbers(found: Difference, console: Console) -> None:
    """Of each stage those that are not equal."""
    equal = True
    for stage, numbers in found.numbers.items():
        rows = []
        for metric in METRICS:
            told = numbers.get(metric.name)
            if told is None or told.a == told.b:
                continue
            cell = Text(say("not the same\nitems"), style="dim")
            if told.change:
                style = {"better": "green", "worse": "red"}.get(metric.word(told.change), "")
                cell = Text(metric.lines(told.change, sign=True), style=style)
            rows.append(Row(metric.heading, [metric.lines(told.a), metric.lines(told.b), cell]))
        if rows:
            title = say("numbers with 95 % intervals (B - A: taken item by item)")
            console.print("" if not equal else Text(title, style="italic"))
            print_matrix(stage, ["A", "B", "B - A"], rows, console)
            equal = False
    if equal:
        console.print(say("{what}: equal", what=say("numbers")))


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


def _both(a: Results, b: Results) -> list[str]:
    return [name for name in a.reward_models if name in b.reward_models]


def _differences(a: Any, b: Any, prefix: str = "") -> dict[str, Pair]:
    """Dotted keys whose values differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        found: dict[str, Pair] = {}
        for key in dict.fromkeys([*a, *b]):
            found |= _differences(a.get(key), b.get(key), f"{prefix}{key}.")
        return found
    return {} if a == b else {prefix.rstrip("."): (a, b)}


def _sources(manifests: dict[str, Manifest | None]) -> dict[str, Json]:
    """Per stage and role of a file: how many rows were used, and its hash."""
    found: dict[str, Json] = {}
    for stage, manifest in manifests.items():
        if manifest is None:
            continue
        found[f"{stage} base"] = {"base": manifest.parts.model["base"], "dtype": manifest.dtype}
        used = {source.path: source.used for source in manifest.data.sources}
        named = {**manifest.section["data"], "questions": manifest.section.get("questions")}
        for role, sha256 in manifest.data_hashes.items():
            found[f"{stage} {role}"] = {"rows": used.get(str(named.get(role))), "sha256": sha256}
    return found


def _after(manifests: dict[str, Manifest | None]) -> dict[str, float]:
    return {
        f"{stage} {key}": value
        for stage, manifest in manifests.items()
        for key, value in (manifest.after if manifest else {}).items()
    }


def _unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Pair]:
    return {key: (a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)}


def _table(console: Console, title: str, what: str, rows: Mapping[str, tuple[str, str]]) -> None:
    if not rows:
        console.print(say("{what}: equal", what=title))
        return
    table = Table(title=title, box=None, pad_edge=False)
    for heading in (what, "A", "B"):
        table.add_column(heading, no_wrap=True)
    for key, pair in rows.items():
        table.add_row(Text(key), *(Text(cell) for cell in pair))
    print_rows(table, console)


def _file(told: Json | None) -> str:
    if told is None:
        return ""
    if "base" in told:
        return say("{base}, in {dtype}", base=str(told["base"])[:24], dtype=told["dtype"])
    sha256 = str(told["sha256"])[:12]
    return sha256 if told["rows"] is None else f"{counted(told['rows'], 'row')}, {sha256}"


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _short(value: Any) -> str:
    text = say("unset") if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""What an evaluation has left in a run's folder, and whether it still holds."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.disk.atomic import Json, digest, read_json
from pipeline.errors import UserError
from pipeline.evaluate.measure import Measure
from pipeline.measure.metric import Estimate
from pipeline.recipe.recipe import Recipe

RESULTS = 6
"""Counts up when results.json says something else or in another way."""
FIELDS = {field.name for field in fields(Estimate)}


def folder(recipe: Recipe, runs: Path) -> Path:
    return runs / recipe.name / "evaluation"


def sealed(value: Json) -> Json:
    """What goes into a file of the evaluation, with a digest by which a change of it is told."""
    written: Json = as_written(value)
    return {**written, "digest": digest([RESULTS, written])}


def as_written(value: Any) -> Any:
    """Results as JSON has them: every Estimate is a dict of its fields."""
    if isinstance(value, Estimate):
        return asdict(value)
    if isinstance(value, dict):
        return {key: as_written(inner) for key, inner in value.items()}
    return [as_written(inner) for inner in value] if isinstance(value, list) else value


def as_read(value: Any) -> Any:
    """The other way round."""
    if isinstance(value, dict):
        inner = {key: as_read(below) for key, below in value.items()}
        return Estimate(**inner) if inner.keys() == FIELDS else inner
    return [as_read(below) for below in value] if isinstance(value, list) else value


def read_results(where: Path) -> Json | None:
    """The results of the last evaluation; None if there was none.

    Raises UserError if the file is damaged, was changed since it was written, or is another version's.
    """
    file = where / "results.json"
    try:
        known = read_json(file)
    except UserError:
        known = {}
    if known is None:
        return None
    found = {key: value for key, value in known.items() if key != "digest"}
    if known.get("digest") != sealed(found)["digest"]:
        raise UserError(f"{file} is damaged, was changed by hand, or is of another version. Make it anew: onebase eval")
    read: Json = as_read(found)
    return read


def columns(results: Json) -> dict[str, Json]:
    """The numbers of every policy in the order of a table; the base with examples stands beside the base without."""
    found: dict[str, Json] = {}
    for policy, numbers in results["numbers"].items():
        if policy == "base" and results["few_shot"]:
            found |= {"base, zero-shot": numbers, "base, few-shot": results["few_shot"]}
        else:
            found[policy] = numbers
    return found


def read_verdicts(run: Path) -> dict[tuple[str, str], Json]:
    """The last evaluation's verdicts, by stage and sha256 of its adapter, where that adapter and the one it is compared
    with still lie in the run's folder."""
    try:
        results = read_results(run / "evaluation")
        chain = {stage["name"]: stage for stage in (results or {}).get("chain", [])}
        there = {name: Artifact(run / name).manifest() for name in chain}
    except UserError:
        return {}
    same = {name for name, found in there.items() if found and found.files.get(WEIGHTS) == chain[name]["adapter"]}
    return {
        (name, chain[name]["adapter"]): results["verdicts"][name]
        for name in same
        if results and (chain[name]["from"] not in chain or chain[name]["from"] in same)
    }


def read_fresh(measure: Measure, where: Path) -> Json | None:
    """What was measured before, if nothing has changed since, the file itself included."""
    try:
        known = read_json(where / measure.file) or {}
    except UserError:
        return None
    whole = known.get("value_digest") == digest(known.get("value"))
    return known if whole and known.get("fingerprint") == measure.fingerprint else None

"""What an evaluation has left in a run's folder, and whether it still holds."""

from __future__ import annotations

from pathlib import Path

from pipeline.artifact import WEIGHTS, Artifact, Json, digest, read_json
from pipeline.errors import UserError
from pipeline.evaluate.plan import Measure
from pipeline.recipe import Recipe

RESULTS = 4
"""Counts up when results.json says something else or in another way."""


def folder(recipe: Recipe, runs: Path) -> Path:
    return runs / recipe.name / "evaluation"


def sealed(value: Json) -> Json:
    """What goes into a file of the evaluation, with a digest by which a change of it is told."""
    return {**value, "digest": digest([RESULTS, value])}


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
    same = {name for name, found in there.items() if found and found["files"].get(WEIGHTS) == chain[name]["adapter"]}
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

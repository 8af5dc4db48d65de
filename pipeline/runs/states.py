"""Where every stage of a recipe stands on disk, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.disk import versions
from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.disk.atomic import Json, digest
from pipeline.errors import UserError
from pipeline.recipe.recipe import RUNS, Recipe


@dataclass(frozen=True)
class State:
    """Where a stage stands: fresh, unmeasured (trained, but its held-out files are others since), stale, stopped (a
    checkpoint to go on from), damaged or new, and why."""

    name: str
    word: str
    why: str

    @property
    def fresh(self) -> bool:
        """Its adapter is what the recipe asks for."""
        return self.word in ("fresh", "unmeasured")

    @property
    def due(self) -> bool:
        return self.word != "fresh"


def states(recipe: Recipe, runs: Path = RUNS) -> list[State]:
    """Every stage in order with what the next run would do about it."""
    parts = recipe.parts()
    by_name: dict[str, State] = {}
    for name in recipe.order():
        waiting = [parent for parent in recipe.parents(name).values() if not by_name[parent].fresh]
        parents = recipe.parent_artifacts(name, runs)
        out = recipe.artifact(name, runs)
        by_name[name] = _find_state(out, parts[name], recipe.measured_on(name), parents, waiting)
    return list(by_name.values())


def _find_state(
    out: Artifact, parts: Json, measured_on: Json, parents: dict[str, Artifact], waiting: list[str]
) -> State:
    manifest = out.manifest()
    fingerprint = digest(parts)
    if manifest is not None and manifest.fingerprint == fingerprint:
        try:
            out.verify()
        except UserError as error:
            return State(out.name, "damaged", str(error))
        for role, parent in parents.items():
            noted, theirs = manifest.parents.get(role), parent.manifest()
            if not waiting and (noted and noted.adapter) != (theirs and theirs.files.get(WEIGHTS)):
                return State(out.name, "stale", f"'{parent.name}' has been trained again, with another result")
        changed = _list_differences({"data": manifest.data.measured_on}, {"data": measured_on})
        if changed:
            return State(out.name, "unmeasured", "; ".join(changed))
        others = versions.compare(manifest.versions, versions.installed())
        return State(out.name, "fresh", f"made with {versions.describe(others)}" if others else "")
    checkpoint = out.last_checkpoint(fingerprint)
    if checkpoint is not None:
        several = (out.claimed() or {}).get("processes", 1)
        step = f"goes on from step {checkpoint.name.rsplit('-', 1)[1]}"
        return State(out.name, "stopped", step + (f", with {several} processes" if several > 1 else ""))
    before = manifest.parts.model_dump() if manifest else (out.claimed() or {}).get("parts")
    if before is None:
        return State(out.name, "new", f"after {waiting[0]}" if waiting else "never run")
    changed = _list_differences(before, parts) if isinstance(before, dict) else []
    return State(out.name, "stale", "; ".join(changed) or "it was cut short")


def _list_differences(before: Json, now: Json, prefix: str = "") -> list[str]:
    """What has changed between two sets of parts, in words."""
    differences = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        place = f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            differences += _list_differences(old, new, f"{place}.".removeprefix("stage."))
        elif prefix == "parents.":
            differences.append(f"its parent ({key}) has changed")
        elif place in ("data.path", "data.test", "data.questions"):
            what = "changed" if old and new else "been named" if new else "been taken away"
            differences.append(f"the file of {place.removeprefix('data.') if key == 'questions' else place} has {what}")
        elif place.startswith("data.reward "):
            what = "changed" if old and new else "come into use" if new else "gone out of use"
            differences.append(f"{place.rpartition(': ')[2]}, which the reward reads, has {what}")
        elif place == "arithmetic":
            differences.append(f"this version of OneBase trains it in another way ({_short(old)}, now {_short(new)})")
        else:
            differences.append(f"{place} was {_short(old)}, is {_short(new)}")
    return differences


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

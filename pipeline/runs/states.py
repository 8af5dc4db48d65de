"""Where every stage of a recipe stands on disk, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.disk import metrics, versions
from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.disk.atomic import Json, digest, holder
from pipeline.errors import UserError
from pipeline.language.say import kept, say, say_again
from pipeline.recipe.recipe import RUNS, Recipe
from pipeline.recipe.waiting import waiting


@dataclass(frozen=True)
class State:
    """Where a stage stands: fresh, unmeasured (trained, but its held-out files are others since), waiting (for people's
    votes), stale, stopped (a checkpoint to go on from), damaged or new, and why; to look at also running (see
    standing())."""

    name: str
    word: str
    why: str

    @property
    def reason(self) -> str:
        """Why, in the language that is spoken."""
        return say("; ").join(map(say_again, self.why.split("; ")))

    @property
    def fresh(self) -> bool:
        """Its adapter is what the recipe asks for."""
        return self.word in ("fresh", "unmeasured")

    @property
    def due(self) -> bool:
        """A run would do something about it."""
        return self.word not in ("fresh", "waiting")


def states(recipe: Recipe, runs: Path = RUNS) -> list[State]:
    """Every stage in order with what the next run would do about it."""
    parts, lacking = recipe.parts(), waiting(recipe)
    by_name: dict[str, State] = {}
    for name in recipe.order():
        not_fresh = [parent for parent in recipe.parents(name).values() if not by_name[parent].fresh]
        parents = recipe.parent_artifacts(name, runs)
        out = recipe.artifact(name, runs)
        state = _find_state(out, parts[name], recipe.measured_on(name), parents, not_fresh)
        if name in lacking and not (state.fresh or state.word == "damaged"):
            state = State(name, kept("waiting"), lacking[name].told)
        by_name[name] = state
    return list(by_name.values())


def standing(recipe: Recipe, runs: Path = RUNS) -> list[State]:
    """The same to look at: a stage that a process is at work on is running."""
    going_on, found = holder(runs / recipe.name / ".lock"), states(recipe, runs)
    if going_on is None:
        return found
    pid, stage = going_on
    return [_running(recipe, runs, stage, pid) if state.name == stage else state for state in found]


def _running(recipe: Recipe, runs: Path, stage: str, pid: str) -> State:
    """By the claim that it made when it began to train, and the last step it has noted."""
    out = recipe.artifact(stage, runs)
    claim = out.claimed() or {}
    if claim.get("fingerprint") == digest(recipe.parts()[stage]) and "steps" in claim:
        step = max((row["step"] for row in metrics.read(out.metrics)), default=0)
        why = kept("step {step} of {steps} (process {n})", step=step, steps=claim["steps"], n=pid)
    else:
        why = kept("before its first step (process {n})", n=pid)
    return State(stage, kept("running"), why)


def _find_state(
    out: Artifact, parts: Json, measured_on: Json, parents: dict[str, Artifact], waiting: list[str]
) -> State:
    manifest = out.manifest()
    fingerprint = digest(parts)
    if manifest is not None and manifest.fingerprint == fingerprint:
        try:
            out.verify()
        except UserError as error:
            return State(out.name, kept("damaged"), str(error))
        for role, parent in parents.items():
            noted, theirs = manifest.parents.get(role), parent.manifest()
            if not waiting and (noted and noted.adapter) != (theirs and theirs.files.get(WEIGHTS)):
                return State(
                    out.name,
                    kept("stale"),
                    kept("'{parent}' has been trained again, with another result", parent=parent.name),
                )
        changed = _list_differences({"data": manifest.data.measured_on}, {"data": measured_on})
        if changed:
            return State(out.name, kept("unmeasured"), "; ".join(changed))
        others = versions.compare(manifest.versions, versions.installed())
        made_with = kept("made with {versions}", versions=versions.describe(others)) if others else ""
        return State(out.name, kept("fresh"), made_with)
    checkpoint = out.last_checkpoint(fingerprint)
    if checkpoint is not None:
        several = (out.claimed() or {}).get("processes", 1)
        step = checkpoint.name.rsplit("-", 1)[1]
        why = kept("goes on from step {step}", step=step)
        if several > 1:
            why = kept("goes on from step {step}, with {n} processes", step=step, n=several)
        return State(out.name, kept("stopped"), why)
    before = manifest.parts.model_dump() if manifest else (out.claimed() or {}).get("parts")
    if before is None:
        return State(out.name, kept("new"), kept("after {parent}", parent=waiting[0]) if waiting else kept("never run"))
    changed = _list_differences(before, parts) if isinstance(before, dict) else []
    return State(out.name, kept("stale"), "; ".join(changed) or kept("it was cut short"))


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
            differences.append(kept("its parent ({role}) has changed", role=key))
        elif place in ("data.path", "data.test", "data.questions"):
            what = place.removeprefix("data.") if key == "questions" else place
            if old and new:
                differences.append(kept("the file of {what} has changed", what=what))
            elif new:
                differences.append(kept("the file of {what} has been named", what=what))
            else:
                differences.append(kept("the file of {what} has been taken away", what=what))
        elif place.startswith("data.reward "):
            what = place.rpartition(": ")[2]
            if old and new:
                differences.append(kept("{what}, which the reward reads, has changed", what=what))
            elif new:
                differences.append(kept("{what}, which the reward reads, has come into use", what=what))
            else:
                differences.append(kept("{what}, which the reward reads, has gone out of use", what=what))
        elif place.startswith("data.environment "):
            what = place.rpartition(": ")[2]
            if old and new:
                differences.append(kept("{what}, which the environment reads, has changed", what=what))
            elif new:
                differences.append(kept("{what}, which the environment reads, has come into use", what=what))
            else:
                differences.append(kept("{what}, which the environment reads, has gone out of use", what=what))
        elif place == "arithmetic":
            told = kept(
                "this version of OneBase trains it in another way ({old}, now {new})", old=_short(old), new=_short(new)
            )
            differences.append(told)
        elif old is None:
            differences.append(kept("{place} was unset, is {new}", place=place, new=_short(new)))
        elif new is None:
            differences.append(kept("{place} was {old}, is unset", place=place, old=_short(old)))
        else:
            differences.append(kept("{place} was {old}, is {new}", place=place, old=_short(old), new=_short(new)))
    return differences


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

"""One stage, from its rows to its sealed artifact."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pipeline.disk import versions
from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.disk.atomic import Json, digest, locked, write_text
from pipeline.disk.manifest import Cost, Data, Manifest, Parent, Parts, SourceCounts
from pipeline.errors import UserError
from pipeline.recipe.recipe import Recipe
from pipeline.runs import sharding
from pipeline.runs.choose import choose_section
from pipeline.runs.energy import Meter
from pipeline.runs.rows import load_rows
from pipeline.stages.stage import Context

ORPHAN_PATIENCE = 15.0
"""Seconds that a worker whose runner was killed has to be gone."""


def run_stage(recipe: Recipe, stage: str, runs: Path) -> None:
    """Run one stage of a recipe whose parents are fresh, and seal it. One that is trained, and whose held-out files are
    not those it was measured on, is measured again."""
    if stage not in recipe.stages:
        raise UserError(f"no stage '{stage}' in the recipe {recipe.name} (there is: {', '.join(recipe.stages)})")
    sharding.refuse()
    parts = recipe.parts()
    fingerprint = digest(parts[stage])
    out = recipe.artifact(stage, runs)
    named = recipe.parents(stage)
    parents = {
        role: _sound_parent(parent, digest(parts[named[role]]), parts[stage]["model"]["base"])
        if role in named
        else parent  # from the Hub: proven when pulled, and its base by the digest of the base in memory
        for role, parent in recipe.parent_artifacts(stage, runs).items()
    }
    measured_on = recipe.measured_on(stage)
    former = out.manifest()
    if former is not None and former.fingerprint != fingerprint:
        former = None
    if former is not None and former.data.measured_on == measured_on:
        print(f"{stage} is fresh", flush=True)
        return
    if former is not None:
        out.verify()
        print(f"  {stage} is measured again; nothing is trained", flush=True)
    data, sources = load_rows(recipe, stage)
    refused = [source.refused for source in sources if len(source.refused)]

    import torch
    from accelerate import PartialState

    everyone = PartialState(cpu=not torch.cuda.is_available())
    with _alone(out) if everyone.is_main_process else contextlib.nullcontext():
        started, meter = time.time(), Meter()
        by = {"processes": everyone.num_processes, "versions": versions.installed()}
        begun = _to_go_on_with(out, fingerprint, everyone.num_processes)
        changed = _versions_changed(by["versions"], begun, parents)
        for what, other in changed.items() if everyone.is_main_process else ():
            print(f"  warning: {what} was made with {versions.said(other)}", flush=True)

        def claim() -> Path | None:
            if everyone.is_main_process:
                out.claim(fingerprint, parts[stage], by)
                if refused:
                    write_text(out.refused, (_json_line(entry) for entry in itertools.chain(*refused)))
            everyone.wait_for_everyone()
            return out.last_checkpoint(fingerprint)

        section = choose_section(recipe, stage, runs, fingerprint, everyone)
        context = Context(
            model=recipe.spec.model,
            data=data,
            parents=parents,
            out=out,
            seed=recipe.spec.seed,
            fingerprint=fingerprint,
            claim=claim,
            questions_hash=measured_on.get("questions"),
            trained=out.adapter if former else None,
        )
        result = recipe.kind(stage).run(section, context)
        if everyone.is_main_process:
            write_text(out.samples, "".join(_json_line(sample) for sample in result.samples))
            if result.refused:
                write_text(out.refused, (_json_line(entry) for entry in itertools.chain(*refused, result.refused)))
            cost = _cost(started, meter)
            found = Data(
                sources=[SourceCounts(**source.counts()) for source in sources],
                held_out=None if data.test is None else len(data.test),
                questions=len(data.questions),
                counts=former.data.counts if former else result.counts,
                measured_on=measured_on,
            )
            chosen = section.model_dump(by_alias=True)
            numbers: Json = {"section": chosen, "data": found, "before": result.before, "after": result.after}
            numbers["tables"] = result.tables
            if former:
                out.seal(former.model_copy(update={**numbers, "again": cost}))
                return
            out.seal(
                Manifest(
                    stage=stage,
                    kind=section.kind,
                    fingerprint=fingerprint,
                    parts=Parts(**parts[stage]),
                    parents={role: _note_parent(parent) for role, parent in parents.items()},
                    base=recipe.spec.model.base,
                    base_hash=parts[stage]["model"]["base"],
                    base_digest=result.base_digest,
                    seed=recipe.spec.seed,
                    invariants=result.invariants,
                    labels=result.labels,
                    several_labels=result.several_labels,
                    processes=everyone.num_processes,
                    versions_changed=changed,
                    **numbers,
                    **cost.model_dump(),
                )
            )


def _to_go_on_with(out: Artifact, fingerprint: str, processes: int) -> Json:
    """The claim under which a checkpoint of this stage lies here, empty if there is none.

    Raises UserError if it was made by another number of processes: a step would learn from other rows than before.
    """
    claim, checkpoint = out.claimed() or {}, out.last_checkpoint(fingerprint)
    if checkpoint is None or claim.get("fingerprint") != fingerprint:
        return {}
    if claim.get("processes") != processes:
        raise UserError(
            f"{checkpoint} was made by {claim.get('processes')} processes, and here there are {processes}: a step "
            f"would learn from another number of rows. Go on with as many (the file of --launch-config says how many; "
            f"without it there is 1), or delete {out.checkpoints} to begin the stage again."
        )
    return claim


def _versions_changed(now: Json, begun: Json, parents: dict[str, Artifact]) -> Json:
    """Where other versions of the libraries made what this stage builds upon: {what: {library: [then, now]}}."""
    noted = {"its checkpoint": begun.get("versions") or {}}
    noted |= {f"'{parent.name}'": parent.finished().versions for parent in parents.values()}
    found = {what: versions.others(then, now) for what, then in noted.items()}
    return {what: other for what, other in found.items() if other}


def _sound_parent(parent: Artifact, fingerprint: str, base: str) -> Artifact:
    manifest = parent.verify()
    if manifest.base_hash != base:
        raise UserError(
            f"{parent.folder} was trained on another base ({manifest.base}, {manifest.base_hash}) than "
            f"this recipe's ({base}). Run '{parent.name}' again on this base, or name that base in the recipe."
        )
    if manifest.fingerprint != fingerprint:
        raise UserError(f"{parent.folder} is stale: recipe or data have changed since. Run '{parent.name}' first.")
    return parent


def _note_parent(parent: Artifact) -> Parent:
    """Which stage this one goes on from, down to the bytes of its adapter."""
    manifest = parent.verify()
    return Parent(
        stage=parent.name,
        fingerprint=manifest.fingerprint,
        adapter=manifest.files[WEIGHTS],
        hub=manifest.hub,
        lineage=manifest.lineage,
    )


@contextlib.contextmanager
def _alone(out: Artifact) -> Iterator[None]:
    """One process writes a stage. One whose runner was killed is dying; it is given a moment to be gone."""
    deadline = time.monotonic() + ORPHAN_PATIENCE
    refusal = f"{out.folder} is being written by process {{pid}}. Wait for it, or end it."
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(locked(out.folder / ".lock", refusal))
                break
            except UserError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield


def _cost(started: float, meter: Meter) -> Cost:
    import resource

    import torch

    cuda = torch.cuda.is_available()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else resident
    return Cost(
        started=datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        seconds=round(time.time() - started, 1),
        device=torch.cuda.get_device_name() if cuda else f"cpu ({torch.get_num_threads()} threads)",
        peak_memory_mib=round(peak),
        energy_wh=meter.watt_hours(),
        energy_of=meter.of,
        peak_memory_is="CUDA memory allocated" if cuda else "resident set of the process",
        versions=versions.installed(),
    )


def _json_line(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "replace").decode() + "\n"

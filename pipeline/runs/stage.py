"""One stage, from its rows to its sealed artifact."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from datetime import UTC, datetime
from pathlib import Path

from pipeline.disk import versions
from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.disk.atomic import Json, digest, locked, write_text
from pipeline.disk.manifest import Cost, Data, Manifest, Parent, Parts
from pipeline.errors import UserError
from pipeline.language.say import kept, say
from pipeline.recipe.recipe import Recipe
from pipeline.runs import sharding
from pipeline.runs.choose import choose_section
from pipeline.runs.dtype import settle_run
from pipeline.runs.energy import Meter
from pipeline.runs.rows import load_rows
from pipeline.stages.stage import Context, StageSpec
from pipeline.training.trackers import Trackers

ORPHAN_PATIENCE = 15.0
"""Seconds that a worker has to be gone whose runner was killed: one process at a time writes a stage."""


def run_stage(recipe: Recipe, stage: str, runs: Path, after_training: float | None = None) -> None:
    """Run one stage of a recipe whose parents are fresh, and seal it. One that is trained, and whose held-out files are
    not those it was measured on, is measured again. `after_training`: seconds that the run is expected to go on once
    this stage has taken its last step, to be told while it trains."""
    recipe.named([stage])
    sharding.refuse()
    parts = recipe.parts()
    fingerprint = digest(parts[stage])
    out = recipe.artifact(stage, runs)
    named = recipe.parents(stage)
    parents = {
        role: _verify_parent(parent, digest(parts[named[role]]), parts[stage]["model"]["base"])
        if role in named
        else parent  # from the Hub: proven when pulled, and its base by the digest of the base in memory
        for role, parent in recipe.parent_artifacts(stage, runs).items()
    }
    measured_on = recipe.measured_on(stage)
    former = out.manifest()
    if former is not None and former.fingerprint != fingerprint:
        former = None
    if former is not None and former.data.measured_on == measured_on:
        print(say("{stage} is fresh", stage=stage), flush=True)
        return
    if former is not None:
        out.verify()
        print("  " + say("{stage} is measured again; nothing is trained", stage=stage), flush=True)
    rows, sources = load_rows(recipe, stage)

    import torch
    from accelerate import PartialState

    processes = PartialState(cpu=not torch.cuda.is_available())
    is_main = processes.is_main_process
    refusal = f"{out.folder} is being written by process {{pid}}. Wait for it, or end it."
    lock = locked(out.folder / ".lock", refusal, ORPHAN_PATIENCE) if is_main else contextlib.nullcontext()
    with lock, contextlib.closing(Trackers()) as trackers:
        started, meter = time.time(), Meter()
        model = settle_run(recipe, runs, processes)
        writer = {"processes": processes.num_processes, "versions": versions.installed(), "dtype": model.computes_in}
        begun = _find_checkpoint_claim(out, fingerprint, processes.num_processes)
        changed = _compare_versions(writer["versions"], begun, parents)
        for what, others in changed.items() if is_main else ():
            print(f"  warning: {what} was made with {versions.describe(others)}", flush=True)

        def note_refused(more: list[Json]) -> None:
            refused = [*(source.refused for source in sources), more]
            if any(map(len, refused)):
                write_text(out.refused, map(_json_line, itertools.chain(*refused)))

        def claim() -> Path | None:
            if is_main:
                out.claim(fingerprint, parts[stage], writer)
                note_refused([])
                for source in (source for source in sources if source.refused):
                    n, first = source.reasons.total(), source.refused[0]
                    told = f"{n} unfit rows of {source.path} left out, first {first['place']}: {first['reason']}"
                    print(f"  {told}\n  all of them: {out.refused}", flush=True)
                trackers.start(out, section.train, _describe(section, recipe, parts[stage], parents))
            processes.wait_for_everyone()
            return out.last_checkpoint(fingerprint)

        section = choose_section(recipe, stage, model, runs, fingerprint, processes)
        context = Context(
            model=model,
            data=rows,
            parents=parents,
            out=out,
            seed=recipe.spec.seed,
            fingerprint=fingerprint,
            claim=claim,
            questions_hash=measured_on.get("questions"),
            trained=out.adapter if former else None,
            after_training=after_training,
            trackers=trackers,
        )
        result = recipe.kind(stage).run(section, context)
        if not is_main:
            return
        write_text(out.samples, map(_json_line, result.samples))
        trackers.tell_result(result.counts.get("steps", 0), result.before, result.after, result.samples)
        if result.refused:
            note_refused(result.refused)
        cost = _measure_cost(started, meter)
        data = Data(
            sources=[source.counts() for source in sources],
            held_out=None if rows.test is None else len(rows.test),
            questions=len(rows.questions),
            counts=former.data.counts if former else result.counts,
            measured_on=measured_on,
        )
        chosen = section.model_dump(by_alias=True)
        measured: Json = {"section": chosen, "data": data, "before": result.before, "after": result.after}
        measured["tables"] = result.tables
        if former:
            out.seal(former.model_copy(update={**measured, "again": cost}))
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
                dtype=model.computes_in,
                seed=recipe.spec.seed,
                invariants=result.invariants,
                labels=result.labels,
                several_labels=result.several_labels,
                head_means=result.head_means,
                length_slope=result.length_slope,
                processes=processes.num_processes,
                versions_changed=changed,
                **measured,
                **cost.model_dump(),
            )
        )


def _describe(section: StageSpec, recipe: Recipe, parts: Json, parents: dict[str, Artifact]) -> Json:
    """What trackers note of a stage's run, and of the runs that it goes on from."""
    return {
        "fingerprint": digest(parts),
        "seed": parts["seed"],
        "base": recipe.spec.model.base,
        "model": parts["model"],
        "section": section.model_dump(by_alias=True),
        "data": parts["data"],
        "parents": {
            role: {"stage": parent.name, "fingerprint": parts["parents"][role], "run": parent.tracked().get("run")}
            for role, parent in parents.items()
        },
    }


def _find_checkpoint_claim(out: Artifact, fingerprint: str, processes: int) -> Json:
    """The claim under which a checkpoint of this stage lies here, empty if there is none.

    Raises UserError if it was made by another number of processes: a step would learn from other rows than before.
    """
    claim, checkpoint = out.claimed() or {}, out.last_checkpoint(fingerprint)
    if checkpoint is None or claim.get("fingerprint") != fingerprint:
        return {}
    if claim.get("processes") != processes:
        raise UserError(
            f"{checkpoint} was made by {claim.get('processes')} processes, and here there are {processes}: a step "
            "would learn from another number of rows. Continue with the same number (the file of --launch-config "
            f"says how many; without it there is 1), or delete {out.checkpoints} to begin the stage again."
        )
    return claim


def _compare_versions(now: Json, begun: Json, parents: dict[str, Artifact]) -> Json:
    """Where other versions of the libraries made what this stage builds upon: {what: {library: [then, now]}}."""
    noted = {"its checkpoint": begun.get("versions") or {}}
    noted |= {f"'{parent.name}'": parent.finished().versions for parent in parents.values()}
    changed = {what: versions.compare(then, now) for what, then in noted.items()}
    return {what: others for what, others in changed.items() if others}


def _verify_parent(parent: Artifact, fingerprint: str, base: str) -> Artifact:
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


def _measure_cost(started: float, meter: Meter) -> Cost:
    import resource

    import torch

    cuda = torch.cuda.is_available()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else resident
    return Cost(
        started=datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        seconds=round(time.time() - started, 1),
        device=torch.cuda.get_device_name() if cuda else _name_cpu(torch.get_num_threads()),
        peak_memory_mib=round(peak),
        energy_wh=meter.watt_hours(),
        energy_of=meter.of,
        peak_memory_is=kept("CUDA memory allocated") if cuda else kept("resident set of the process"),
        versions=versions.installed(),
    )


def _name_cpu(threads: int) -> str:
    return kept("cpu (1 thread)") if threads == 1 else kept("cpu ({n} threads)", n=threads)


def _json_line(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "replace").decode() + "\n"

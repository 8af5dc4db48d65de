"""One stage in one process: data in, run, seal.

accelerate launch -m pipeline.worker RECIPE STAGE [--runs DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

# Before any library reads them: nothing leaves this machine unasked, and two cores do not spin for each other.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pipeline import sharding, versions
from pipeline.artifact import WEIGHTS, Artifact, Json, digest, locked, read_json, write_json, write_text
from pipeline.data.contracts import QUESTION
from pipeline.data.load import DataSpec, Source, labels_as_answers, read_source, read_split
from pipeline.energy import Meter
from pipeline.errors import BrokenInvariant, Interrupted, UserError
from pipeline.plan import auto, cards
from pipeline.plan.cards import Card
from pipeline.plan.memory import CONTEXT
from pipeline.plan.shapes import read_shapes
from pipeline.plan.stage import lengths_of, planned_model
from pipeline.recipe.recipe import Recipe, read
from pipeline.stages.stage import Context, Rows, StageSpec

if TYPE_CHECKING:
    from accelerate import PartialState

ERROR_MARK = "onebase: error: "
"""What comes after it on stderr is for the person; the runner shows it as its own error."""
WATCH = "ONEBASE_DIE_WITH_RUNNER"
ORPHAN_PATIENCE = 15.0
DISK_FULL = ("No space left", "File too large", "inline_container", "PytorchStreamWriter")
"""What libraries say of it without an errno; the last two are torch's writer."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="pipeline.worker", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("stage")
    parser.add_argument("--runs", default="runs", type=Path)
    given = parser.parse_args()
    if os.environ.get(WATCH):
        threading.Thread(target=_die_with_runner, daemon=True).start()
    sys.exit(_guarded(given.recipe, given.stage, given.runs))


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
    if former is not None and former["fingerprint"] != fingerprint:
        former = None
    if former is not None and measured(former) == measured_on:
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

        section = section_chosen(recipe, stage, out, fingerprint, everyone)
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
            numbers = {"before": result.before, "after": result.after}
            found = {
                "sources": [source.counts() for source in sources],
                "held_out": None if data.test is None else len(data.test),
                "questions": len(data.questions),
                "counts": former["data"]["counts"] if former else result.counts,
                "measured_on": measured_on,
            }
            if former:
                out.seal(
                    {**former, "section": section.model_dump(by_alias=True), "data": found, **numbers, "again": cost}
                )
                return
            out.seal(
                {
                    "stage": stage,
                    "kind": section.kind,
                    "fingerprint": fingerprint,
                    "parts": parts[stage],
                    "section": section.model_dump(by_alias=True),
                    "parents": {role: _lineage(parent) for role, parent in parents.items()},
                    "base": recipe.spec.model.base,
                    "base_hash": parts[stage]["model"]["base"],
                    "base_digest": result.base_digest,
                    "data": found,
                    "seed": recipe.spec.seed,
                    **numbers,
                    "invariants": result.invariants,
                    "processes": everyone.num_processes,
                    "versions_changed": changed,
                    **cost,
                }
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
    manifests = {f"'{parent.name}'": parent.manifest() or {} for parent in parents.values()}
    noted = {"its checkpoint": begun, **manifests}
    found = {what: versions.others(of.get("versions") or {}, now) for what, of in noted.items()}
    return {what: other for what, other in found.items() if other}


def measured(manifest: Json) -> Json:
    """The hashes of the held-out files that a finished stage was measured on."""
    return manifest.get("data", {}).get("measured_on", {})  # type: ignore[no-any-return]


def section_chosen(recipe: Recipe, stage: str, out: Artifact, fingerprint: str, everyone: PartialState) -> StageSpec:
    """The stage's section with a number for every auto: those an earlier start of this stage chose, or those that fit
    this machine best. The first process chooses and notes it, also in comments of the run's recipe.yaml, for the word
    itself is what counts; the others, whose memory may differ, are told."""
    from accelerate.utils import broadcast_object_list

    section = recipe.stages[stage]
    if not auto.asked(section):
        return section
    known = _chosen(recipe, stage, out, fingerprint) if everyone.is_main_process else {}
    known = broadcast_object_list([known])[0]
    return auto.taken(section, known["chosen"])


def _chosen(recipe: Recipe, stage: str, out: Artifact, fingerprint: str) -> Json:
    section, file = recipe.stages[stage], out.folder / "chosen.json"
    known = read_json(file) or {}
    if known.get("fingerprint") != fingerprint:
        kind, spec, card = recipe.kind(stage), recipe.spec.model, _this_machine()
        lengths = lengths_of(section, kind.contract, recipe.spec.seed)
        model = planned_model(spec, read_shapes(spec))
        chosen = auto.choices(kind, section, model, spec, lengths, card)
        known = {"fingerprint": fingerprint, "for": f"{card.name}, {card.memory / 2**30:.3g} GiB", "chosen": chosen}
        write_json(file, known)
        resolved = out.folder.parent / "recipe.yaml"
        if resolved.is_file():
            write_text(resolved, resolved.read_text(encoding="utf-8") + choices_noted(out, fingerprint))
    settings = ", ".join(f"{word} {value}" for word, value in known["chosen"].items())
    print(f"  auto, on {known['for']}: {settings}", flush=True)
    return known


def choices_noted(out: Artifact, fingerprint: str) -> str:
    """What auto stood for in a stage, as comments of the resolved recipe."""
    known = read_json(out.folder / "chosen.json") or {}
    if known.get("fingerprint") != fingerprint:
        return ""
    told = (f"# stages.{out.name}.train.{word}: {json.dumps(value)}\n" for word, value in known["chosen"].items())
    return f"# auto, on {known['for']}:\n" + "".join(told)


def _this_machine() -> Card:
    """The GPU that is trained on; without one half of the RAM."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        # what is not free is held by others, and by the context that this process has just opened
        return cards.named(torch.cuda.get_device_name(), min(total, free + CONTEXT), usable=1.0)
    return cards.half_of_ram()


def load_rows(recipe: Recipe, stage: str) -> tuple[Rows, list[Source]]:
    """A stage's rows, checked; and the files they came from, which know what was refused."""
    section = recipe.stages[stage]
    split = read_split(section.data, recipe.kind(stage).contract, recipe.spec.seed)
    file = section.question_file()
    asked = read_source(file, QUESTION, DataSpec(path=file)) if file else None
    rows = Rows(split.train, split.test, labels_as_answers(asked.rows) if asked else [])
    # A held-out share has no file of its own: its rows are counted with the file they were taken from.
    return rows, [*split.sources, *([asked] if asked else [])]


def _sound_parent(parent: Artifact, fingerprint: str, base: str) -> Artifact:
    manifest = parent.verify()
    if manifest.get("base_hash") != base:
        raise UserError(
            f"{parent.folder} was trained on another base ({manifest.get('base')}, {manifest.get('base_hash')}) than "
            f"this recipe's ({base}). Run '{parent.name}' again on this base, or name that base in the recipe."
        )
    if manifest.get("fingerprint") != fingerprint:
        raise UserError(f"{parent.folder} is stale: recipe or data have changed since. Run '{parent.name}' first.")
    return parent


def _lineage(parent: Artifact) -> Json:
    """Which stage this one goes on from, down to the bytes of its adapter."""
    manifest = parent.verify()
    origin = {key: manifest[key] for key in ("hub", "lineage") if key in manifest}
    return {
        "stage": parent.name,
        "fingerprint": manifest["fingerprint"],
        "adapter": manifest["files"][WEIGHTS],
        **origin,
    }


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


def _cost(started: float, meter: Meter) -> Json:
    import resource

    import torch

    cuda = torch.cuda.is_available()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else resident
    return {
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 1),
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({torch.get_num_threads()} threads)",
        "peak_memory_mib": round(peak),
        "energy_wh": meter.watt_hours(),
        "energy_of": meter.of,
        "peak_memory_is": "CUDA memory allocated" if cuda else "resident set of the process",
        "versions": versions.installed(),
    }


def _json_line(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "replace").decode() + "\n"


def _guarded(recipe: str, stage: str, runs: Path) -> int:
    """Run the stage; turn what a person can act upon into one message."""
    try:
        run_stage(read(recipe), stage, runs)
        return 0
    except UserError as error:
        return _fail(str(error), 2)
    except BrokenInvariant as error:
        return _fail(f"stage '{stage}' stopped, a hand-over is not what it must be:\n  {error}", 3)
    except Interrupted as error:
        print(f"  {stage}: {error}; a checkpoint was saved", flush=True)
        return 130
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        traceback.print_exc()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return _fail(_disk_full(runs, error) if full else f"stage '{stage}' failed: {error}", 2)
    except Exception as error:
        traceback.print_exc()
        # torch's own writer says so without an errno
        if any(
            words in str(error) for words in ("No space left", "File too large", "inline_container", "StreamWriter")
        ):
            return _fail(_disk_full(runs, error), 2)
        if "out of memory" in str(error).lower():
            return _fail(
                f"stage '{stage}' ran out of memory. Halve per_device_train_batch_size and double "
                "gradient_accumulation_steps (the result is the same), or set gradient_checkpointing: true.",
                2,
            )
        return _fail(f"stage '{stage}' failed: {type(error).__name__}: {error}", 1)


def _disk_full(runs: Path, error: Exception) -> str:
    return f"the disk of {runs} is full ({error}). Nothing half-written counts as done: free some space and run again."


def _fail(message: str, status: int) -> int:
    print(f"{ERROR_MARK}{message}", file=sys.stderr, flush=True)
    return status


def _die_with_runner() -> None:
    """The runner holds the other end of stdin; if it is killed, the pipe closes, and so does this process."""
    # Not through sys.stdin: a thread blocked in its buffer makes the interpreter abort when it shuts down.
    while os.read(0, 1):
        pass
    os._exit(137)


if __name__ == "__main__":
    main()

"""Walk a recipe's stages in order: skip the fresh, launch the stale in a process of their own, say why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import sharding, versions
from pipeline.artifact import WEIGHTS, Artifact, Json, digest, locked, write_text
from pipeline.errors import UserError
from pipeline.recipe import gates, yaml
from pipeline.recipe.recipe import RUNS, Recipe
from pipeline.stages.check import check_base
from pipeline.worker import ERROR_MARK, WATCH, choices_noted, load_rows, measured

CPU_ENVIRONMENT = {
    # Threads that wait do not spin, and glibc keeps the large blocks that training frees and asks for again at every
    # step; returning them to the kernel makes a step 1.4 times as long (scripts/bench_malloc.py, 2 cores, AMD EPYC).
    "OMP_WAIT_POLICY": "passive",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
GPU_ENVIRONMENT = {
    # Batches of unequal length leave holes in CUDA memory that no later batch fits; segments that grow leave none.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Names under which torch takes the allocator's settings; with one of them set, they are the person's own."""
PATIENCE = {
    # Seconds that torch's launcher of several processes waits for them after Ctrl-C. Left to itself it kills them after
    # 30, and a step before the checkpoint may take longer; a second Ctrl-C still kills at once.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600",
}


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
    found: dict[str, State] = {}
    for name in recipe.order():
        waiting = [parent for parent in recipe.parents(name).values() if not found[parent].fresh]
        parents = recipe.parent_artifacts(name, runs)
        found[name] = _state(recipe.artifact(name, runs), parts[name], recipe.measured_on(name), parents, waiting)
    return list(found.values())


def run(
    recipe: Recipe,
    only: Sequence[str] = (),
    from_: str | None = None,
    runs: Path | str = RUNS,
    launch_config: Path | None = None,
    force: bool = False,
) -> list[str]:
    """Bring a recipe's stages up to date and return the names of those that were run.

    only: these stages alone.  from_: this stage and those that go on from it.  What they build upon must be fresh.
    launch_config: an accelerate config file for several GPUs; one process without it.
    force: go on although a stage misses what the recipe expects of it.

    Raises UserError for anything a person can correct; KeyboardInterrupt once a stage has stopped with a checkpoint.
    """
    runs = Path(runs)
    sharding.refuse(launch_config)
    chosen = _chosen(recipe, only, from_)
    refusal = f"the run '{recipe.name}' is already going on in process {{pid}} (lock {runs / recipe.name / '.lock'})."
    with locked(runs / recipe.name / ".lock", refusal):
        found = {state.name: state for state in states(recipe, runs)}
        planned = [state for state in found.values() if state.name in chosen]
        for state in planned:
            _check_before(recipe, state, found, chosen)
        resolved = runs / recipe.name / "recipe.yaml"
        parts = recipe.parts()
        notes = [choices_noted(recipe.artifact(name, runs), digest(parts[name])) for name in recipe.order()]
        write_text(resolved, yaml.dump(recipe.pinned_tree()) + "".join(notes))
        done = []
        for index, state in enumerate(planned, 1):
            print(
                f"[{index}/{len(planned)}] {state.name}: {state.word}{', ' + state.why if state.why else ''}",
                flush=True,
            )
            if state.due:
                for parent in sorted(set(recipe.parents(state.name).values()) - chosen):  # held below otherwise
                    gates.hold(recipe.spec.expect, recipe.artifact(parent, runs), force)
                _launch(recipe, state.name, resolved, runs, launch_config)
                done.append(state.name)
            gates.hold(recipe.spec.expect, recipe.artifact(state.name, runs), force)
        return done


def _check_before(recipe: Recipe, state: State, found: dict[str, State], chosen: set[str]) -> None:
    """Whatever would stop a stage and can be known without a model is said before the first stage is launched."""
    if state.word == "damaged":
        raise UserError(state.why)
    if not state.due:
        return
    for parent in recipe.parents(state.name).values():
        if parent not in chosen and not found[parent].fresh:
            why = found[parent].why
            raise UserError(
                why
                if found[parent].word == "damaged"
                else f"'{state.name}' goes on from '{parent}', which is {found[parent].word} ({why}). "
                f"Run it too: --only {parent} --only {state.name}, or leave --only and --from away."
            )
    load_rows(recipe, state.name)
    check_base(recipe.spec.model, {state.name: recipe.stages[state.name]})


def _chosen(recipe: Recipe, only: Sequence[str], from_: str | None) -> set[str]:
    for name in [*only, *([from_] if from_ else [])]:
        if name not in recipe.stages:
            raise UserError(f"no stage '{name}' in the recipe {recipe.name} (there is: {', '.join(recipe.stages)})")
    if only:
        return set(only)
    if from_ is None:
        return set(recipe.stages)
    after = {from_}
    for name in recipe.order():
        if after & set(recipe.parents(name).values()):
            after.add(name)
    return after


def _state(out: Artifact, parts: Json, measured_on: Json, parents: dict[str, Artifact], waiting: list[str]) -> State:
    manifest = out.manifest()
    fingerprint = digest(parts)
    if manifest is not None and manifest.get("fingerprint") == fingerprint:
        try:
            out.verify()
        except UserError as error:
            return State(out.name, "damaged", str(error))
        for role, parent in parents.items():
            grown_from = manifest.get("parents", {}).get(role, {}).get("adapter")
            if not waiting and grown_from != (parent.manifest() or {}).get("files", {}).get(WEIGHTS):
                return State(out.name, "stale", f"'{parent.name}' has been trained again, with another result")
        changed = _differences({"data": measured(manifest)}, {"data": measured_on})
        other = versions.others(manifest.get("versions", {}), versions.installed())
        if changed:
            return State(out.name, "unmeasured", "; ".join(changed))
        return State(out.name, "fresh", f"made with {versions.said(other)}" if other else "")
    checkpoint = out.last_checkpoint(fingerprint)
    if checkpoint is not None:
        several = (out.claimed() or {}).get("processes", 1)
        step = f"goes on from step {checkpoint.name.rsplit('-', 1)[1]}"
        return State(out.name, "stopped", step + (f", with {several} processes" if several > 1 else ""))
    before = manifest or out.claimed()
    if before is None or "parts" not in before:
        return State(out.name, "new", f"after {waiting[0]}" if waiting else "never run")
    changed = _differences(before["parts"], parts) if isinstance(before["parts"], dict) else []
    return State(out.name, "stale", "; ".join(changed) or "it was cut short")


def _differences(before: Json, now: Json, prefix: str = "") -> list[str]:
    """What has changed between two sets of parts, in words."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        place = f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{place}.".removeprefix("stage."))
        elif prefix == "parents.":
            found.append(f"its parent ({key}) has changed")
        elif place in ("data.path", "data.test", "data.questions"):
            what = "changed" if old and new else "been named" if new else "been taken away"
            found.append(f"the file of {place.removeprefix('data.') if key == 'questions' else place} has {what}")
        elif place.startswith("data.reward "):
            what = "changed" if old and new else "come into use" if new else "gone out of use"
            found.append(f"{place.rpartition(': ')[2]}, which the reward reads, has {what}")
        elif place == "arithmetic":
            found.append(f"this version of OneBase trains it in another way ({_short(old)}, now {_short(new)})")
        else:
            found.append(f"{place} was {_short(old)}, is {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _launch(recipe: Recipe, stage: str, resolved: Path, runs: Path, config: Path | None) -> None:
    out = recipe.artifact(stage, runs)
    out.folder.mkdir(parents=True, exist_ok=True)
    # Left to itself accelerate gives a process one CPU thread.
    single = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    single += ["--num_cpu_threads_per_process", os.environ.get("OMP_NUM_THREADS", str(_cores()))]
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *(["--config_file", str(config)] if config else single),
        *("-m", "pipeline.worker", str(resolved), stage, "--runs", str(runs)),
    ]
    variables = {**environment(), WATCH: "1", "PYTHONUNBUFFERED": "1"}
    if config is None:
        # TRL's trainers refuse a process that sees several GPUs; one is what a run without a config is about.
        variables.setdefault("CUDA_VISIBLE_DEVICES", "0")
    with out.log.open("ab") as log:
        begun = log.tell()
        # A session of its own: Ctrl-C comes to the runner alone, which asks the worker to stop and waits for it.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log, env=variables, start_new_session=True)
        try:
            status = process.wait()
        except BaseException:
            _stop(process)
            raise
    if status == 0:
        if (out.manifest() or {}).get("fingerprint") == digest(recipe.parts()[stage]):
            return
        raise UserError(f"stage '{stage}' ended early, without an error and without a result. Its log is {out.log}")
    said = out.log.read_bytes()[begun:].decode("utf-8", "replace")
    if ERROR_MARK in said:
        raise UserError(_message(said))
    if "\nKeyboardInterrupt" in said or status in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    tail = "\n  ".join(said.strip().splitlines()[-8:])
    raise UserError(
        f"stage '{stage}' ended without a word (status {status}): killed from outside, or out of memory.\n  {tail}\n"
        f"Its log is {out.log}. Run again to go on from the last checkpoint."
    )


def environment() -> dict[str, str]:
    """Of a process that loads a model."""
    own = any(name in os.environ for name in ALLOCATORS)
    gpu = {} if own else GPU_ENVIRONMENT
    return {**PATIENCE, **(gpu if _has_gpu() else CPU_ENVIRONMENT), **os.environ}


def _cores() -> int:
    import psutil

    return min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def _message(said: str) -> str:
    """The worker's own words, without what the launcher prints after them."""
    return said.rsplit(ERROR_MARK, 1)[1].split("\nTraceback (most recent call last)")[0].strip()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask launcher and worker to end, the worker after a checkpoint, and wait for both; a second Ctrl-C kills them."""
    try:
        while _signal(process, signal.SIGINT):
            while _signal(process, 0):
                process.poll()
                time.sleep(0.1)
    except KeyboardInterrupt:
        _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> bool:
    """Signal the group of processes that was launched; False once none of it is left."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True

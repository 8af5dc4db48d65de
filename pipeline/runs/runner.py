"""Walk a recipe's stages in order: skip the fresh, launch the stale in a process of their own, say why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.disk.atomic import digest, locked
from pipeline.errors import UserError
from pipeline.language.say import say, say_again
from pipeline.models.time_limit import find_hung
from pipeline.recipe import gates
from pipeline.recipe.recipe import RUNS, Recipe
from pipeline.runs import sharding
from pipeline.runs.environment import ERROR_MARK, QUIET, WATCH, ended_in_order, make_environment, spin_if_idle
from pipeline.runs.estimate import Clock, estimate, spoken
from pipeline.runs.recipe_file import refuse_foreign, write_recipe
from pipeline.runs.rows import load_rows
from pipeline.runs.states import State, states
from pipeline.runs.told import Told
from pipeline.stages.check import check_base, check_engines, check_liger, check_trackers
from pipeline.stages.stage import Rows

SPINS = 3000
"""A stage is long: what begins beside it later should not wait for its threads."""
LAUNCHER = "accelerate.commands.launch"
ALONE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_USE_CPU": "false"}
"""What the launcher would tell one process: it is not asked, since it imports torch for it, at every stage."""


def run(
    recipe: Recipe,
    only: Sequence[str] = (),
    from_: str | None = None,
    runs: Path | str = RUNS,
    launch_config: Path | None = None,
    force: bool = False,
) -> list[str]:
    """Bring a recipe's stages up to date and return the names of those that were run. One that waits for people's votes
    is passed over.

    only: these stages alone.  from_: this stage and those that go on from it.  What they build upon must be fresh.
    launch_config: an accelerate config file for several GPUs; one process without it.
    force: go on although a stage misses what the recipe expects of it.

    Raises UserError for anything a person can correct; KeyboardInterrupt once a stage has stopped with a checkpoint.
    """
    runs = Path(runs)
    sharding.refuse(launch_config)
    refuse_foreign(runs / recipe.name / "recipe.yaml")
    chosen = _choose_stages(recipe, only, from_)
    refusal = f"the run '{recipe.name}' is already going on in process {{pid}} (lock {runs / recipe.name / '.lock'})."
    with ended_in_order(), locked(runs / recipe.name / ".lock", refusal) as note:
        by_name = {state.name: state for state in states(recipe, runs)}
        planned = [state for state in by_name.values() if state.name in chosen]
        rows = {state.name: _check_before(recipe, state, by_name, chosen) for state in planned}
        resolved = runs / recipe.name / "recipe.yaml"
        write_recipe(recipe, resolved, runs)
        clock = _look_ahead(recipe, runs, rows, planned, launch_config)
        done, told = [], Told(recipe, runs)
        for index, state in enumerate(planned, 1):
            stands = say_again(state.word)
            if state.why:
                stands = say("{state}, {more}", state=stands, more=state.reason)
            print(f"[{index}/{len(planned)}] " + say("{stage}: {word}", stage=state.name, word=stands), flush=True)
            if state.due:
                for parent in sorted(set(recipe.parents(state.name).values()) - chosen):  # held below otherwise
                    gates.hold(recipe.spec.expect, recipe.artifact(parent, runs), force)
                told.begin(state.name)
                note(state.name)
                print("  " + say("loading the libraries"), flush=True)
                _launch(recipe, state.name, resolved, runs, launch_config, clock.after_training(state.name))
                note("")
                clock.finish(state.name)
                told.end(state.name)
                done.append(state.name)
            if state.word != "waiting":
                gates.hold(recipe.spec.expect, recipe.artifact(state.name, runs), force)
        return done


def _look_ahead(
    recipe: Recipe, runs: Path, rows: dict[str, Rows | None], planned: list[State], launch_config: Path | None
) -> Clock:
    """The time that the stages which are due will take, said where it is known."""
    due = {name: own for name, own in rows.items() if own is not None}
    if not due or launch_config:  # what several GPUs share is not estimated
        return Clock({})
    trained = {state.name for state in planned if state.word == "unmeasured"}
    clock = estimate(recipe, runs, due, trained, _cores())
    if clock.durations:
        stages = say("1 stage") if len(due) == 1 else say("{n} stages", n=len(due))
        print(say("{stages}, {time} on this machine", stages=stages, time=spoken(clock.whole)), flush=True)
    return clock


def _check_before(recipe: Recipe, state: State, by_name: dict[str, State], chosen: set[str]) -> Rows | None:
    """Whatever would stop a stage and can be known without a model is said before the first stage is launched. Gives
    the rows of a stage that is due."""
    if state.word == "damaged":
        raise UserError(state.why)
    if not state.due:
        return None
    for parent in (by_name[name] for name in recipe.parents(state.name).values() if name not in chosen):
        if parent.word == "damaged":
            raise UserError(parent.why)
        if not parent.fresh:
            raise UserError(
                f"'{state.name}' continues '{parent.name}', which is {parent.word} ({parent.why}). "
                f"Run it too: --only {parent.name} --only {state.name}, or leave --only and --from away."
            )
    rows, _ = load_rows(recipe, state.name)
    check_base(recipe.spec.model, {state.name: recipe.stages[state.name]})
    check_trackers({state.name: recipe.stages[state.name]})
    check_engines(recipe.spec.model, {state.name: recipe.stages[state.name]})
    check_liger(recipe.spec.model, {state.name: recipe.stages[state.name]})
    return rows


def _choose_stages(recipe: Recipe, only: Sequence[str], from_: str | None) -> set[str]:
    recipe.named([*only, *([from_] if from_ else [])])
    if only:
        return set(only)
    if from_ is None:
        return set(recipe.stages)
    after = {from_}
    for name in recipe.order():
        if after & set(recipe.parents(name).values()):
            after.add(name)
    return after


def _cores() -> str:
    """CPU threads of a stage; left to itself accelerate gives a process one."""
    import psutil

    cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))
    return os.environ.get("OMP_NUM_THREADS", str(cores))


def _launch(
    recipe: Recipe, stage: str, resolved: Path, runs: Path, config: Path | None, after_training: float | None
) -> None:
    out = recipe.artifact(stage, runs)
    out.folder.mkdir(parents=True, exist_ok=True)
    worker = ["-m", "pipeline.runs.worker", str(resolved), stage, "--runs", str(runs)]
    if after_training is not None:
        worker += ["--after-training", f"{after_training:.0f}"]
    command = [sys.executable, *(["-m", LAUNCHER, "--config_file", str(config)] if config else []), *worker]
    variables = {**({} if config else spin_if_idle(SPINS)), **make_environment(), WATCH: "1", "PYTHONUNBUFFERED": "1"}
    if variables["TRANSFORMERS_VERBOSITY"] == QUIET["TRANSFORMERS_VERBOSITY"]:
        variables["TRANSFORMERS_VERBOSITY"] = "warning"  # nobody reads it on the terminal, and the log is to keep it
    if config is None:
        # TRL's trainers refuse a process that sees several GPUs; one is what a run without a config is about.
        variables.setdefault("CUDA_VISIBLE_DEVICES", "0")
        variables |= {**ALONE, "OMP_NUM_THREADS": _cores()}
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
        manifest = out.manifest()
        if manifest and manifest.fingerprint == digest(recipe.parts()[stage]):
            return
        raise UserError(f"stage '{stage}' ended early, without an error and without a result. Its log is {out.log}")
    logged = out.log.read_bytes()[begun:].decode("utf-8", "replace")
    if ERROR_MARK in logged:
        # The worker's own words, without what the launcher prints after them.
        raise UserError(logged.rsplit(ERROR_MARK, 1)[1].split("\nTraceback (most recent call last)")[0].strip())
    if "\nKeyboardInterrupt" in logged or status in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    whole = out.last_checkpoint(digest(recipe.parts()[stage]))
    again = (
        f"Run again to go on from {whole.name}."
        if whole
        else "No checkpoint had been written: run again, and the stage begins anew."
    )
    if hung := find_hung(logged):
        raise UserError(
            f"stage '{stage}': the environment's {hung} did not return within its time, and nothing could interrupt "
            f"it. Correct it. {again}"
        )
    raise UserError(
        f"stage '{stage}' ended without a message (status {status}): it was killed by the system or by another "
        f"program, for example because memory ran out.\n{_last_words(logged)}Its log is {out.log}. {again}"
    )


def _last_words(logged: str) -> str:
    """The last lines of the worker, without the traceback of the launcher that it died under."""
    own, mark, last = logged.rpartition("Traceback (most recent call last)")
    if mark and LAUNCHER.replace(".", "/") in last:
        logged = own
    return "".join(f"  {line}\n" for line in logged.strip().splitlines()[-8:])


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

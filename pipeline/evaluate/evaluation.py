"""Held-out questions to every policy and reward model of a run, one process for all, one loaded base.

Each measure of each stage is an artifact of its own, runs/<recipe>/evaluation/<measure>-<stage>.json, with a
fingerprint over all that it depends on: the adapters' bytes, the base, the held-out rows, the settings. What is fresh
is not computed again, and results.json holds the numbers made of them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.contracts import Row
from pipeline.disk.artifact import WEIGHTS
from pipeline.disk.atomic import Json, digest, locked, read_json, sha256_of_file, write_json, write_text
from pipeline.errors import UserError
from pipeline.evaluate import benchmarks, people
from pipeline.evaluate import judge as judges
from pipeline.evaluate.judge import Judge
from pipeline.evaluate.measure import METHOD, Measure, plain
from pipeline.evaluate.measures import Answers
from pipeline.evaluate.plan import learnt, own_judges, plan
from pipeline.evaluate.stored import RESULTS, Arena, Link, Results, folder, read_fresh, read_results
from pipeline.language.say import say
from pipeline.recipe.recipe import Recipe
from pipeline.runs.dtype import begun_in, settle
from pipeline.runs.environment import ERROR_MARK, make_environment, spin_if_idle
from pipeline.runs.recipe_file import write_recipe
from pipeline.runs.states import states
from pipeline.stages.stage import BASE

JUDGED = "judge.jsonl"
"""An external judge's verdicts one by one: what it was shown, on which side, and what it replied."""
SPINS = 8000
"""An evaluation is many small products, and short: more than this gains nothing."""


def launch(recipe: Recipe, runs: Path, judge: tuple[str, str] | None = None, tasks: Sequence[str] = ()) -> Results:
    """Evaluate a run in a process of its own, as stages are run, and return results.json. Raises UserError.

    judge: URL and model of an OpenAI-compatible endpoint on this machine that compares answers.
    tasks: of lm-eval, by name or as files.
    """
    where = folder(recipe, runs)
    plan(recipe, runs, [benchmarks.source(task) for task in tasks])
    resolved, log = where / "recipe.yaml", where / "log.txt"
    write_recipe(recipe, resolved, runs)
    command = [sys.executable, "-m", "pipeline.evaluate.process", str(resolved), "--runs", str(runs)]
    command += ["--votes", str(people.arena_of(recipe))]
    if judge:
        Judge(*judge)
        command += ["--judge", *judge]
    if tasks:
        command += ["--lm-eval", *tasks]
    with log.open("wb") as errors:
        variables = {**spin_if_idle(SPINS), **make_environment()}
        status = subprocess.run(command, stderr=errors, env=variables, check=False).returncode
    if status:
        said = log.read_text(encoding="utf-8", errors="replace")
        if ERROR_MARK in said:
            raise UserError(said.rsplit(ERROR_MARK, 1)[1].strip())
        tail = "\n  ".join(said.strip().splitlines()[-8:])
        raise UserError(f"the evaluation ended with status {status}:\n  {tail}\nIts log is {log}.")
    return results_of(recipe, runs)


def results_of(recipe: Recipe, runs: Path) -> Results:
    """The results of the last evaluation. Raises UserError if there was none, or if they are not as written."""
    results = read_results(folder(recipe, runs))
    if results is None:
        raise UserError(f"{recipe.name} has not been evaluated. Type: onebase eval RECIPE")
    return results


def take(recipe: Recipe, runs: Path, missing: list[Measure]) -> None:
    """Load the base once and take the measures that are not fresh, each written as soon as it is there."""
    from pipeline.evaluate.bench import Bench

    begun = time.monotonic()
    folders = {name: folder for measure in missing for name, folder in measure.folders.items()}
    rewards = [name for name in folders if name in recipe.stages and not recipe.kind(name).answers]
    bench = Bench(
        settle(recipe.spec.model, begun_in(recipe, runs)),
        {name: adapter for name, adapter in folders.items() if name not in rewards},
        {name: folders[name] for name in rewards},
        next((m.more["temperature"] for m in missing if "temperature" in m.more), 1.0),
    )
    print("  " + say("loaded in {n} s", n=f"{time.monotonic() - begun:.0f}"), flush=True)
    with bench.ready():
        for index, measure in enumerate(missing, 1):
            begun = time.monotonic()
            value, more = measure.take(bench), measure.more
            seconds = round(time.monotonic() - begun, 1)
            keep = {key: more[key] for key in more if key not in ("train", "examples")}
            write_json(
                folder(recipe, runs) / measure.file,
                {"fingerprint": measure.fingerprint, "seconds": seconds, "settings": keep}
                | {"rows": plain(measure.rows), "value": value, "value_digest": digest(value)},
            )
            told = say("{name} of {stage}: {n} s", name=measure.name, stage=measure.place, n=f"{seconds:.1f}")
            print(f"  [{index}/{len(missing)}] {told}", flush=True)


def judged(answers: dict[str, Json], where: Path, judge: Judge | None) -> Arena | None:
    """The judge's verdicts on every policy's first answers; those of an earlier evaluation where nothing has changed
    since and no other judge is asked."""
    if len(answers) < 2:
        return None
    told = {policy: [texts[0] for texts in measure["value"]["text"]] for policy, measure in answers.items()}
    prompts = [row["prompt"] for row in next(iter(answers.values()))["rows"]]
    try:
        known = read_json(where / "judge.json") or {}
    except UserError:
        known = {"model": "(unknown)"}
    model = judge.model if judge else known.get("model")
    fingerprint = digest([METHOD, RESULTS, model, prompts, told])
    rows = where / JUDGED
    kept = sha256_of_file(rows) if rows.is_file() else None
    whole = known.get("value_digest") == digest(known.get("value")) and known.get("rows") == kept
    if known.get("fingerprint") != fingerprint or not whole:
        if judge is None:
            if known:
                why = "answers have changed since" if whole else "a file of them is not as it was written"
                print(
                    f"  judge {model}: its verdicts are left out, as {why}. To ask again: --judge URL MODEL", flush=True
                )
            return None
        print("  " + say("asking the judge {model} ...", model=judge.model), flush=True)
        held, verdicts = judges.arena(judge, [judges.question(prompt) for prompt in prompts], told)
        unread = [row["reply"] for row in verdicts if row["verdict"] is None]
        if unread:
            print(f"  {len(unread)} replies were not A, B or tie and count as ties, such as {unread[0]!r}", flush=True)
        found = held.described(model=model, unread=len(unread)).model_dump()
        write_text(rows, (judges.line(row) for row in verdicts))
        print("  " + say("every verdict is in {file}", file=rows), flush=True)
        known = {"fingerprint": fingerprint, "model": model, "value": found, "value_digest": digest(found)}
        known["rows"] = sha256_of_file(rows)
        write_json(where / "judge.json", known)
    return Arena.model_validate(known["value"])


def still_fresh(recipe: Recipe, runs: Path, asked: Sequence[str]) -> list[Row]:
    """Tasks of lm-eval that an earlier evaluation was asked for and whose results still hold; of the others it is
    said that they are left out. `asked`: those asked for now, which are not among them."""
    where = folder(recipe, runs)
    kept = []
    try:
        known = read_results(where)
        earlier = known.tasks if known else []
    except UserError:  # they are made anew
        earlier = []
    for task in earlier:
        if task in asked:
            continue
        try:
            source = benchmarks.source(task)
            measures = [m for m in plan(recipe, runs, [source]) if isinstance(m, benchmarks.Benchmark)]
            if all(read_fresh(measure, where) for measure in measures):
                kept.append(source)
                continue
            why = "the run or the task has changed"
        except UserError as error:
            why = str(error)
        print(f"  lm-eval {task}: left out, as {why}. To have it again: --lm-eval {task}", flush=True)
    return kept


def evaluate(
    recipe: Recipe, runs: Path, judge: Judge | None = None, tasks: Sequence[str] = (), votes: Path | None = None
) -> None:
    """Bring a run's evaluation up to date and write results.json. `votes`: the folder of people's votes on stages,
    where it does not lie beside the recipe."""
    from pipeline.evaluate import results

    where = folder(recipe, runs)
    with locked(where / ".lock", f"{where} is being written by process {{pid}}. Wait for it, or end it."):
        asked = [benchmarks.source(task) for task in tasks] + still_fresh(recipe, runs, tasks)
        wanted = plan(recipe, runs, asked)
        missing = [measure for measure in wanted if read_fresh(measure, where) is None]
        fresh = len(wanted) - len(missing)
        print(say("{name}: {n} measures, {fresh} fresh", name=recipe.name, n=len(wanted), fresh=fresh), flush=True)
        begun = time.monotonic()
        needed = [measure.task for measure in missing if isinstance(measure, benchmarks.Benchmark)]
        if needed:
            benchmarks.loadable(list(dict.fromkeys(needed)))
        if missing:
            take(recipe, runs, missing)
        taken = []
        for measure in wanted:
            known = read_fresh(measure, where)
            assert known is not None
            taken.append((measure, known))
        answers = {measure.subject: known for measure, known in taken if type(measure) is Answers}
        voted, told = people.read_arena(votes or people.arena_of(recipe))
        for line in told:
            print(f"  {line}", flush=True)
        chain = _chain(recipe, runs)
        adapters = {BASE: "", **{link.name: link.adapter for link in chain if link.answers}}
        rated = people.rate(voted, adapters) if voted else None
        found = results.make(taken, chain, judged(answers, where, judge), rated)
        made_of = {measure.file: measure.fingerprint for measure in wanted}
        made_of |= {people.MADE_OF: people.fingerprint(voted)} if voted else {}
        found = found.model_copy(update={"tasks": [source["task"] for source in asked], "made_of": made_of})
        if missing:
            print("  " + say("{n} s together", n=f"{time.monotonic() - begun:.0f}"), flush=True)
        write_json(where / "results.json", found.sealed())


def _chain(recipe: Recipe, runs: Path) -> list[Link]:
    """The finished stages in order."""
    done = [state.name for state in states(recipe, runs) if state.fresh]
    own, had = own_judges(recipe, done), learnt(recipe, runs, done)
    manifests = {name: recipe.artifact(name, runs).finished() for name in done}
    return [
        Link.of(
            recipe,
            name,
            own_judges=own[name],
            before=manifests[name].before,
            after=manifests[name].after,
            adapter=manifests[name].files[WEIGHTS],
            **had[name],
        )
        for name in done
    ]

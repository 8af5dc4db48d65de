"""What there is to measure of a run: every measure of every finished stage, with a fingerprint of all it depends on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.data.contracts import Row
from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.disk.atomic import Json, digest, sha256_of_file
from pipeline.errors import UserError
from pipeline.evaluate.benchmarks import Benchmark
from pipeline.evaluate.measures import BASE, MEASURES, Measure
from pipeline.measure.matching import NEW_TOKENS
from pipeline.recipe.recipe import Recipe
from pipeline.runs.rows import load_rows
from pipeline.runs.states import states
from pipeline.stages.reward_file import read_by
from pipeline.stages.stage import Rows

PROMPTS = 20
"""Held-out prompts answered by sampling, evenly spaced among those there are."""
SHOTS = 4


@dataclass(frozen=True)
class Finished:
    """What the finished stages of a run have: policies to measure, and held-out rows to measure them by."""

    policies: list[str]
    """The base first."""
    learners: list[str]
    """The policies but the base and those that learnt from documents alone."""
    corpus: Sequence[Row]
    dialogues: Sequence[Row]
    compared: Sequence[Row]
    questions: list[Row]
    closed: list[Row]
    """Of these, those that have choices."""
    labelled: list[Row]
    """Those that have a label for an answer."""
    examples: list[Row]
    """Short dialogues of the training data."""
    rewards: dict[str, Rows]
    """The comparisons of every reward model."""
    prompts: list[Row]
    sampling: Json
    """How prompts are answered, and by which judges the answers are scored."""
    references: dict[str, str | None]
    """The policies trained on preferences, and where each started from."""
    snapshots: dict[str, list[int]]
    """Steps at which such a policy was kept on its way."""
    drawn_from: str | None
    """The policy that best-of-n is drawn from."""


def own_judges(recipe: Recipe, done: Sequence[str]) -> dict[str, dict[str, str]]:
    """For every stage the judges it was trained on, each with how: what ppo was paid by, and the reward models that
    learnt from pairs which dpo, or what ppo was paid by, learnt from as well."""
    kinds = {name: recipe.stages[name].kind for name in done}
    models = [name for name in done if kinds[name] == "reward"]
    pairs = {name: _pairs(recipe, name) for name in done if models and kinds[name] in ("reward", "dpo")}
    found: dict[str, dict[str, str]] = {}
    for name in done:
        paid = [term.source for term in recipe.stages[name].reward_terms() if term.weight]
        found[name] = dict.fromkeys(paid, "which it was paid by")
        for taught in [name] if kinds[name] == "dpo" else [source for source in paid if source in pairs]:
            for model in [model for model in models if model not in found[name]]:
                if both := len(pairs[taught] & pairs[model]):
                    whose = "its" if taught == name else f"{taught}'s"
                    found[name][model] = f"which saw {both} of {whose} {len(pairs[taught])} pairs"
    return found


def _pairs(recipe: Recipe, name: str) -> set[int]:
    """The comparisons a stage was trained on, each as the start of its digest."""
    rows = load_rows(recipe, name)[0].train
    return {int(digest([row.get(key) for key in ("prompt", "chosen", "rejected")])[:16], 16) for row in rows}


def plan(recipe: Recipe, runs: Path, benchmarks: Sequence[Row] = ()) -> list[Measure]:
    """Every measure that the finished stages allow, whether or not it is fresh.

    benchmarks: tasks of lm-eval, as evaluate/benchmarks.py describes them.

    Raises UserError if no stage has finished, or if a finished one no longer belongs to the recipe.
    """
    standing = {state.name: state for state in states(recipe, runs)}
    done = [name for name in recipe.order() if standing[name].fresh]
    stale = [state for state in standing.values() if state.word in ("stale", "damaged")]
    if stale:
        why = "; ".join(f"{state.name} is {state.word} ({state.why})" for state in stale)
        raise UserError(f"{why}. Run it first: what is measured must be what the recipe says.")
    if not done:
        raise UserError(f"no stage of {recipe.name} has finished below {runs / recipe.name}. Run it first.")
    run = _finished(recipe, runs, done)
    wanted = [measure for kind in MEASURES for measure in kind.wanted(run)]
    wanted += [Benchmark(policy, [task]) for policy in run.policies for task in benchmarks]
    hashes = {name: recipe.artifact(name, runs).verify().files[WEIGHTS] for name in done}
    model = recipe.parts()[done[0]]["model"]
    found = []
    for measure in (measure for measure in wanted if measure.rows):
        folders = {name: recipe.artifact(name, runs).adapter for name in measure.others if name in done}
        if measure.subject in done:
            artifact = recipe.artifact(measure.subject, runs)
            folders[measure.place] = artifact.adapter if measure.step is None else artifact.snapshot(measure.step)
        used = {name: hashes.get(name) or sha256_of_file(folder / WEIGHTS) for name, folder in folders.items()}
        found.append(replace(measure, adapters=used, folders=folders, model=model))
    twice = [file for file, count in Counter(measure.file for measure in found).items() if count > 1]
    if twice:
        raise UserError(f"two tasks of --lm-eval would both be kept as {twice[0]}: give them other names")
    return found


def _finished(recipe: Recipe, runs: Path, done: list[str]) -> Finished:
    """What the finished stages have for measures to choose from."""
    held_out = {name: _rendered(load_rows(recipe, name)[0], recipe.artifact(name, runs)) for name in done}
    of_kind: dict[str, list[str]] = {kind: [] for kind in ("pretrain", "sft", "reward", "dpo", "ppo")}
    for name in done:
        of_kind[recipe.stages[name].kind].append(name)

    def first_test(*names: str) -> Sequence[Row]:
        return next((rows for name in names if (rows := held_out[name].test)), ())

    asked = _distinct([row for name in done for row in held_out[name].questions])
    policies = [name for name in done if recipe.kind(name).answers]
    compared = [row for name in done if name in of_kind["dpo"] + of_kind["reward"] for row in held_out[name].test or []]
    prompts = _prompts([row for name in of_kind["ppo"] for row in held_out[name].test or []] or asked or compared)
    references = {name: recipe.stages[name].from_ for name in policies if name in [*of_kind["dpo"], *of_kind["ppo"]]}
    started = {name: parent for name, parent in references.items() if parent}
    return Finished(
        policies=[BASE, *policies],
        learners=[name for name in policies if recipe.stages[name].kind != "pretrain"],
        corpus=first_test(*of_kind["pretrain"]),
        dialogues=first_test(*of_kind["sft"]),
        compared=first_test(*of_kind["dpo"], *of_kind["reward"]),
        questions=asked,
        closed=[row for row in asked if len(row.get("choices", [])) > 1 and not row.get("labelled")],
        labelled=[row for row in asked if row.get("labelled")],
        examples=_examples(held_out[of_kind["sft"][0]].train) if of_kind["sft"] else [],
        rewards={name: held_out[name] for name in of_kind["reward"]},
        prompts=prompts,
        sampling=_sampling(recipe, of_kind["ppo"], prompts, _sources(recipe, of_kind)),
        references=references,
        snapshots={name: list(recipe.artifact(name, runs).snapshots()) for name in started},
        drawn_from=next(iter(started.values()), next(reversed(of_kind["sft"]), None)),
    )


def _rendered(rows: Rows, artifact: Artifact) -> Rows:
    """A stage's rows without those that it left out itself (on_bad_row: skip): a template cannot write them."""
    if not artifact.refused.is_file():
        return rows
    left_out = {json.loads(line)["place"] for line in artifact.refused.read_text(encoding="utf-8").splitlines()}

    def kept(some: Sequence[Row]) -> list[Row]:
        return [row for row in some if row["_place"] not in left_out]

    return replace(rows, train=kept(rows.train), test=None if rows.test is None else kept(rows.test))


def _sampling(recipe: Recipe, ppo: list[str], prompts: list[Row], sources: list[str]) -> Json:
    """How held-out prompts are answered: as PPO samples, where there is a ppo stage."""
    words = recipe.stages[ppo[0]].train if ppo else {}
    declared = [term.source for name in ppo for term in recipe.stages[name].reward_terms() if term.truth]
    answered = all(row.get("answer") is not None for row in prompts)
    truth = declared[0] if declared else "answer" if answered else None
    named = [source for source in (*sources, truth or "") if ".py:" in source]
    read = {source: read_by(Path(source.rpartition(":")[0])) for source in named}
    files = {source: {name: sha256_of_file(path) for name, path in found.items()} for source, found in read.items()}
    return {
        "new_tokens": int(words.get("response_length", NEW_TOKENS)),
        "temperature": float(words.get("temperature", 1.0)),
        "seed": recipe.spec.seed,
        "sources": sources,
        "truth": truth,
        "functions": files,
    }


def _sources(recipe: Recipe, of_kind: dict[str, list[str]]) -> list[str]:
    """Judges of sampled answers: the reward models there are, or else the first function that PPO is paid by."""
    if of_kind["reward"]:
        return of_kind["reward"]
    terms = [term for name in of_kind["ppo"] for term in recipe.stages[name].reward_terms()]
    return [term.source for term in terms if term.weight > 0][:1]


def _prompts(held_out: list[Row]) -> list[Row]:
    """Held-out prompts to be answered by sampling."""
    rows = _distinct(held_out)
    columns = {key for row in rows for key in row}
    # Every row has every column, so that a reward function always sees the same ones; evenly spaced among all.
    every = [rows[int(place)] for place in _spread(len(rows), PROMPTS)]
    return [{key: row.get(key) for key in sorted(columns)} for row in every]


def _spread(count: int, wanted: int) -> list[float]:
    return [place * count / min(count, wanted) for place in range(min(count, wanted))] if count else []


def _distinct(rows: list[Row]) -> list[Row]:
    return list({digest(row["prompt"]): row for row in reversed(rows)}.values())[::-1]


def _examples(train: Sequence[Row]) -> list[Row]:
    """Short dialogues of the training data, as examples for few-shot prompting."""
    whole = [
        {"messages": row["messages"] if "messages" in row else row["prompt"] + row["completion"]}
        for row in train
        if "messages" in row or isinstance(row["prompt"], list)
    ]
    short = [row for row in whole if [m["role"] for m in row["messages"]] == ["user", "assistant"]]
    return [short[int(place)] for place in _spread(len(short), SHOTS)]

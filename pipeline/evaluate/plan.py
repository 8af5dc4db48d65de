"""What there is to measure of a run: every measure of every finished stage, with a fingerprint of all it depends on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.data.contracts import DEMONSTRATION, LANGUAGE_MODELING, PREFERENCE, RATED, Row
from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.disk.atomic import Json, digest, read_lines, sha256_of_file
from pipeline.errors import UserError
from pipeline.evaluate.benchmarks import Benchmark
from pipeline.evaluate.measure import Finished, Measure
from pipeline.evaluate.measures import MEASURES, loss_of
from pipeline.language.say import kept
from pipeline.measure.metric import CORPUS_LOSS, DIALOGUE_LOSS
from pipeline.plan.sizes import NEW_TOKENS
from pipeline.ppo.shipped import SHIPPED
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.sections import ancestors
from pipeline.runs.rows import load_rows
from pipeline.runs.states import states
from pipeline.stages.reward_file import read_by
from pipeline.stages.stage import BASE, Rows, Stage

PROMPTS = 20
"""Held-out prompts answered by sampling, evenly spaced among those there are."""
SHOTS = 4


def own_judges(recipe: Recipe, done: Sequence[str]) -> dict[str, dict[str, str]]:
    """For every stage the judges it was trained on, each with how: what ppo was paid by, and the reward models that
    learnt from pairs which dpo, or what ppo was paid by, learnt from as well, or from answers that kto did."""
    models = [name for name in done if recipe.kind(name).ranks]
    pairs = {name: _pairs(recipe, name) for name in done if models and recipe.kind(name).contract is PREFERENCE}
    found: dict[str, dict[str, str]] = {}
    for name in done:
        paid = [term.source for term in recipe.stages[name].reward_terms() if term.weight]
        found[name] = dict.fromkeys(paid, kept("which it was paid by"))
        # A reward model is not judged by answers.
        own = [name] if name in pairs and name not in models else []
        for taught in own or [source for source in paid if source in pairs]:
            for model in [model for model in models if model not in found[name]]:
                if both := len(pairs[taught] & pairs[model]):
                    of = len(pairs[taught])
                    told = kept("which saw {n} of its {of} pairs", n=both, of=of)
                    if taught != name:
                        told = kept("which saw {n} of {stage}'s {of} pairs", n=both, stage=taught, of=of)
                    found[name][model] = told
        if models and recipe.kind(name).contract is RATED:
            rated = _answers(recipe, name)
            for model in models:
                if both := len(rated & _answers(recipe, model)):
                    found[name][model] = kept("which saw {n} of its {of} answers", n=both, of=len(rated))
    return found


def _pairs(recipe: Recipe, name: str) -> set[int]:
    """The comparisons a stage was trained on, each as the start of its digest."""
    rows = load_rows(recipe, name)[0].train
    return {int(digest([row.get(key) for key in ("prompt", "chosen", "rejected")])[:16], 16) for row in rows}


def _answers(recipe: Recipe, name: str) -> set[int]:
    """The answers a stage was trained on with whether each is the better one, as the start of their digest."""
    found = []
    for row in load_rows(recipe, name)[0].train:
        rated = [("completion", row["label"])] if "completion" in row else [("chosen", True), ("rejected", False)]
        found += [digest([row["prompt"], row[key], good]) for key, good in rated]
    return {int(text[:16], 16) for text in found}


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
    model = {**recipe.parts()[done[0]]["model"], "dtype": recipe.artifact(done[0], runs).finished().dtype}
    for name in done:  # as what a policy answers depends on its tools
        model |= recipe.environment_files(name)
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
        raise UserError(f"two tasks of --lm-eval would both be stored as {twice[0]}: give them other names")
    return found


def _finished(recipe: Recipe, runs: Path, done: list[str]) -> Finished:
    """What the finished stages have for measures to choose from."""
    held_out = {name: _rendered(load_rows(recipe, name)[0], recipe.artifact(name, runs)) for name in done}
    kinds = {name: recipe.kind(name) for name in done}

    def those(fits: Callable[[Stage], bool]) -> list[str]:
        return [name for name in done if fits(kinds[name])]

    def held_out_of(names: list[str]) -> list[Row]:
        return [row for name in names for row in held_out[name].test or []]

    def first_test(names: list[str]) -> Sequence[Row]:
        return next((rows for name in names if (rows := held_out[name].test)), ())

    asked = _distinct([row for name in done for row in held_out[name].questions])
    policies = those(lambda kind: kind.answers)
    models = those(lambda kind: kind.ranks)
    compare = those(lambda kind: kind.contract is PREFERENCE)
    demonstrated = those(lambda kind: kind.contract is DEMONSTRATION)
    samplers = [name for name in done if recipe.stages[name].sampling()]
    references = {name: recipe.stages[name].from_ for name in policies if kinds[name].raises}
    started = {name: parent for name, parent in references.items() if parent}
    prompts = _choose_prompts(held_out_of(samplers) or asked or held_out_of(compare))
    return Finished(
        policies=[BASE, *policies],
        learners=[name for name in policies if kinds[name].contract is not LANGUAGE_MODELING],
        corpus=first_test(those(lambda kind: kind.held_out_loss is CORPUS_LOSS)),
        dialogues=first_test(those(lambda kind: kind.held_out_loss is DIALOGUE_LOSS)),
        compared=first_test(sorted(compare, key=lambda name: name in models)),
        questions=asked,
        closed=[row for row in asked if len(row.get("choices", [])) > 1 and not row.get("labelled")],
        labelled=[row for row in asked if row.get("labelled")],
        examples=_examples(held_out[demonstrated[0]].train) if demonstrated else [],
        rewards={name: held_out[name] for name in models},
        prompts=prompts,
        sampling=_sampling(recipe, samplers, prompts, models),
        references=references,
        snapshots={name: list(recipe.artifact(name, runs).snapshots()) for name in started},
        drawn_from=next(iter(started.values()), next(reversed(demonstrated), None)),
        further=_further(kinds, held_out),
        heirs={name: [heir for heir in policies if name in ancestors(recipe.stages, heir)] for name in done},
    )


def _further(kinds: dict[str, Stage], held_out: dict[str, Rows]) -> dict[str, Sequence[Row]]:
    """The held-out rows of each stage that learns documents, or dialogues, but of the first of each."""
    found: dict[str, Sequence[Row]] = {}
    for metric in (CORPUS_LOSS, DIALOGUE_LOSS):
        own = [name for name, kind in kinds.items() if kind.held_out_loss is metric and held_out[name].test]
        found |= {name: held_out[name].test or () for name in own[1:]}
    return found


def learnt(recipe: Recipe, runs: Path, done: Sequence[str]) -> dict[str, Json]:
    """Of every finished stage, what it can be forgotten by: `held_out`, the measure of the loss on its held-out rows,
    and `asked`, the places of its questions among those of the run."""
    held_out = {name: _rendered(load_rows(recipe, name)[0], recipe.artifact(name, runs)) for name in done}
    further = _further({name: recipe.kind(name) for name in done}, held_out)
    questions = _distinct([row for name in done for row in held_out[name].questions])
    places = {digest(row["prompt"]): place for place, row in enumerate(questions)}
    found: dict[str, Json] = {}
    for name in done:
        loss = recipe.kind(name).held_out_loss
        measure = loss_of(name) if name in further else loss.name if loss and held_out[name].test else ""
        asked = sorted({places[digest(row["prompt"])] for row in held_out[name].questions})
        found[name] = {"held_out": measure, "asked": asked}
    return found


def _rendered(rows: Rows, artifact: Artifact) -> Rows:
    """A stage's rows without those that it left out itself (on_bad_row: skip): a template cannot write them."""
    if not artifact.refused.is_file():
        return rows
    left_out = {json.loads(line)["place"] for line in read_lines(artifact.refused)}

    def chosen(some: Sequence[Row]) -> list[Row]:
        return [row for row in some if row["_place"] not in left_out]

    return replace(rows, train=chosen(rows.train), test=None if rows.test is None else chosen(rows.test))


def _sampling(recipe: Recipe, samplers: list[str], prompts: list[Row], models: list[str]) -> Json:
    """How held-out prompts are answered: as the first stage that samples does it, where there is one. The answers are
    judged by the reward models, or where there are none by the first function that a stage is paid by."""
    settings = recipe.stages[samplers[0]].sampling() if samplers else None
    terms = [term for name in samplers for term in recipe.stages[name].reward_terms()]
    declared = [term.source for term in terms if term.truth]
    answered = all(row.get("answer") is not None for row in prompts)
    truth = declared[0] if declared else "answer" if answered else None
    sources = models or [term.source for term in terms if term.weight > 0][:1]
    functions = [source for source in (*sources, truth or "") if ".py:" in source]
    read = {source: read_by(Path(source.rpartition(":")[0])) for source in functions}
    files = {source: {name: sha256_of_file(path) for name, path in known.items()} for source, known in read.items()}
    files |= {source: {source: SHIPPED[source].is_of} for source in (*sources, truth) if source in SHIPPED}
    return {
        "new_tokens": settings.response_length if settings else NEW_TOKENS,
        "temperature": settings.temperature if settings else 1.0,
        "max_tool_calling_iterations": settings.max_tool_calling_iterations if settings else None,
        "seed": recipe.spec.seed,
        "sources": sources,
        "truth": truth,
        "functions": files,
    }


def _choose_prompts(held_out: list[Row]) -> list[Row]:
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

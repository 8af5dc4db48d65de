"""What there is to measure of a run: every measure of every finished stage, with a fingerprint of all it depends on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.data.contracts import Row
from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.disk.atomic import Json, digest, sha256_of_file
from pipeline.errors import UserError
from pipeline.evaluate.benchmarks import PREFIX, label
from pipeline.measure.matching import NEW_TOKENS
from pipeline.recipe.recipe import Recipe
from pipeline.runs.rows import load_rows
from pipeline.runs.states import states
from pipeline.stages.reward_file import read_by
from pipeline.stages.stage import Rows

METHOD = 3
"""Counts up when a measure is taken differently, so that older results are taken again."""
BASE = "base"
PROMPTS = 20
"""Held-out prompts answered by sampling, evenly spaced among those there are."""
COPIES = 4
SNAPSHOT_COPIES = 1
BEST_OF = 64
SHOTS = 4


@dataclass(frozen=True)
class Measure:
    """One measure of one policy or reward model, not yet taken."""

    name: str
    subject: str
    rows: list[Row]
    more: Json = field(default_factory=dict)
    """Further arguments, which count for the fingerprint like everything else."""
    adapters: dict[str, str] = field(default_factory=dict)
    """sha256 of every adapter that takes part, by stage."""
    model: Json = field(default_factory=dict)

    @property
    def file(self) -> str:
        return f"{self.name}-{self.subject}.json"

    @property
    def fingerprint(self) -> str:
        return digest([METHOD, self.name, self.subject, plain(self.rows), self.more, self.adapters, self.model])


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
    held_out = {name: _rendered(load_rows(recipe, name)[0], recipe.artifact(name, runs)) for name in done}
    hashes = {name: recipe.artifact(name, runs).verify().files[WEIGHTS] for name in done}
    policies = [BASE, *(name for name in done if recipe.kind(name).answers)]
    of_kind = {
        kind: [name for name in done if recipe.stages[name].kind == kind]
        for kind in ("pretrain", "sft", "reward", "dpo", "ppo")
    }
    model = recipe.parts()[done[0]]["model"]
    found: list[Measure] = []

    def add(name: str, subject: str, rows: Sequence[Row] | None, with_: list[str] | None = None, **more: Any) -> None:
        if rows:
            used = {stage: hashes[stage] for stage in [subject, *(with_ or [])] if stage in hashes}
            found.append(Measure(name, subject, list(rows), more, used, model))

    corpus = next((held_out[name].test for name in of_kind["pretrain"] if held_out[name].test), None)
    dialogues = next((held_out[name].test for name in of_kind["sft"] if held_out[name].test), None)
    compared = next(
        (held_out[name].test for name in [*of_kind["dpo"], *of_kind["reward"]] if held_out[name].test), None
    )
    asked = _distinct([row for name in done for row in held_out[name].questions])
    closed = [row for row in asked if len(row.get("choices", [])) > 1 and not row.get("labelled")]
    labelled = [row for row in asked if row.get("labelled")]
    examples = _examples(held_out[of_kind["sft"][0]].train) if of_kind["sft"] else []
    for policy in policies:
        add("corpus_loss", policy, corpus)
        add("dialogue_loss", policy, dialogues)
        if policy != BASE and recipe.stages[policy].kind != "pretrain":
            add("preferences", policy, compared)
        add("questions", policy, asked)
        if policy == BASE and examples and all(isinstance(row["prompt"], list) for row in asked):
            add("few_shot", policy, asked, examples=plain(examples))
        add("choices", policy, closed)
        add("labels", policy, labelled)
        for task in benchmarks:
            add(f"{PREFIX}-{label(task['task'])}", policy, [task])
    for reward in of_kind["reward"]:
        add("pairs", reward, held_out[reward].test, train=plain(held_out[reward].train))
    prompts = _prompts(recipe, done, held_out)
    sources = _sources(recipe, of_kind)
    for policy in policies if prompts else []:
        reference = recipe.stages[policy].from_ if policy in [*of_kind["dpo"], *of_kind["ppo"]] else None
        more = _sampling(recipe, of_kind["ppo"], prompts, sources) | {"copies": COPIES, "reference": reference}
        judges = [*sources, *([reference] if reference else [])]
        add("answers", policy, prompts, judges, **more)
        for step, adapter in recipe.artifact(policy, runs).snapshots().items() if reference else ():
            hashes[at_step(policy, step)] = sha256_of_file(adapter / WEIGHTS)
            add("answers", at_step(policy, step), prompts, judges, **{**more, "copies": SNAPSHOT_COPIES})
    compared_with = reference_of(recipe, done)
    if compared_with and prompts and sources:
        more = _sampling(recipe, of_kind["ppo"], prompts, sources) | {"copies": BEST_OF, "reference": None}
        add("best_of_n", compared_with, prompts, sources, **more)
    twice = [file for file, count in Counter(measure.file for measure in found).items() if count > 1]
    if twice:
        raise UserError(f"two tasks of --lm-eval would both be kept as {twice[0]}: give them other names")
    return found


def _rendered(rows: Rows, artifact: Artifact) -> Rows:
    """A stage's rows without those that it left out itself (on_bad_row: skip): a template cannot write them."""
    if not artifact.refused.is_file():
        return rows
    left_out = {json.loads(line)["place"] for line in artifact.refused.read_text(encoding="utf-8").splitlines()}

    def kept(some: Sequence[Row]) -> list[Row]:
        return [row for row in some if row["_place"] not in left_out]

    return replace(rows, train=kept(rows.train), test=None if rows.test is None else kept(rows.test))


def at_step(policy: str, step: int) -> str:
    """The name of a policy as it was part of the way."""
    return f"{policy}@{step}"


def adapter_of(recipe: Recipe, runs: Path, name: str) -> Path:
    """Where the adapter of a stage, or of a policy part of the way, lies."""
    stage, part, step = name.partition("@")
    artifact = recipe.artifact(stage, runs)
    return artifact.snapshot(int(step)) if part else artifact.adapter


def reference_of(recipe: Recipe, done: list[str]) -> str | None:
    """The policy that preference training started from: best-of-n is drawn from it."""
    trained = [name for name in done if recipe.stages[name].kind in ("ppo", "dpo")]
    parents = [recipe.stages[name].from_ for name in trained]
    return next((p for p in parents if p), next((n for n in reversed(done) if recipe.stages[n].kind == "sft"), None))


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


def _prompts(recipe: Recipe, done: list[str], held_out: dict[str, Any]) -> list[Row]:
    """Held-out prompts: PPO's where it has some, else the questions, else those of the comparisons."""
    ppo = [row for name in done if recipe.stages[name].kind == "ppo" for row in held_out[name].test or []]
    asked = [row for name in done for row in held_out[name].questions]
    compared = [
        row for name in done if recipe.stages[name].kind in ("dpo", "reward") for row in held_out[name].test or []
    ]
    rows = _distinct(ppo or asked or compared)
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


def plain(rows: Sequence[Row]) -> list[Row]:
    """Rows without where they stood."""
    return [{key: value for key, value in row.items() if key != "_place"} for row in rows]

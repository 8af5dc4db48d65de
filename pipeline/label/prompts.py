"""Which prompts people see: for labels none that a test holds out, for the arena those alone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.data.contracts import PROMPT_ONLY, QUESTION, Row
from pipeline.data.load import DataSpec, read_source, read_split
from pipeline.data.prompts import find_prompts, prompt_key
from pipeline.data.votes import read_votes
from pipeline.errors import UserError
from pipeline.language.say import say
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.rounds import read_by
from pipeline.recipe.sections import ancestors
from pipeline.recipe.waiting import waiting


def training_prompts(recipe: Recipe, stage: str, file: str, earlier: list[Path]) -> tuple[list[Row], list[str]]:
    """Prompts to answer, each once, in an order made by the seed: those of a file; or those that a stage of the recipe
    samples from; or else the ones that `stage` has learnt from, or a stage that it comes from where `stage` has learnt
    from votes. What a test holds out is left out. What was labelled in the `earlier` rounds comes last."""
    if file:
        rows: Iterable[Row] = read_source(file, PROMPT_ONLY, DataSpec(path=file)).rows
    else:
        of_stage = [stage, *ancestors(recipe.stages, stage)] if stage in recipe.stages else recipe.order()[::-1]
        sampling = [
            name
            for name in recipe.order()
            if recipe.kind(name).contract is PROMPT_ONLY and not recipe.stages[name].asked_with()
        ]
        asked = [name for name in [*sampling, *of_stage] if not read_by(recipe.stages[name])][:1]
        # A round's stages leave prompts out of training that its votes hold out: these are asked all the same.
        data = [recipe.stages[name].data.model_copy(update={"apart": None}) for name in asked]
        rows = [row for of in data for row in read_split(of, PROMPT_ONLY, recipe.spec.seed).train]
    by_key = {prompt_key(row): row for row in rows}
    held_out = set(_held_out(recipe))
    seen = [row for key, row in by_key.items() if key not in held_out]
    kept = [row for row in seen if not row.get("tools")]
    if not kept:
        raise UserError(
            f"{file or 'the recipe'} gives no prompt to label that no test holds out and that names no tools; name "
            "others with --prompts"
        )
    told = []
    if len(seen) < len(by_key):
        told.append(say("{n} prompts are not shown: a test holds them out", n=len(by_key) - len(seen)))
    told += _tell_of_tools(len(seen) - len(kept))
    random.Random(recipe.spec.seed).shuffle(kept)
    labelled = {prompt_key({"prompt": vote.prompt}) for folder in earlier for vote in read_votes(folder)[0]}
    return sorted(kept, key=lambda row: prompt_key(row) in labelled), told


def held_out_prompts(recipe: Recipe, file: str) -> tuple[list[Row], list[str]]:
    """Prompts to rate stages on, each once, in an order made by the seed: those of a file, or those that the recipe's
    tests hold out."""
    if file:
        rows = list(read_source(file, PROMPT_ONLY, DataSpec(path=file)).rows)
    else:
        rows = [_as_prompt(row) for row in _tests(recipe) if "prompt" in row or "messages" in row]
    seen = list({prompt_key(row): row for row in rows}.values())
    kept = [row for row in seen if not row.get("tools")]
    if not kept:
        raise UserError(
            "no test of the recipe holds out a prompt to rate stages on: give a stage `data.test` or `questions`, or "
            "name prompts with --prompts"
        )
    random.Random(recipe.spec.seed).shuffle(kept)
    return kept, _tell_of_tools(len(seen) - len(kept))


def _as_prompt(row: Row) -> Row:
    """What a row asks last, and the tools that it names."""
    if "prompt" in row:
        return {"prompt": row["prompt"], "tools": row.get("tools")}
    answers = [place for place, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    return {"prompt": row["messages"][: answers[-1]], "tools": row.get("tools")}


def _tell_of_tools(n: int) -> list[str]:
    return [say("{n} prompts are not shown: they name tools", n=n)] if n else []


def _held_out(recipe: Recipe) -> Iterator[str]:
    """What the stages are measured on, as far as it asks something."""
    for row in _tests(recipe):
        yield from find_prompts(row)


def _tests(recipe: Recipe) -> Iterator[Row]:
    lacking = waiting(recipe)
    for name in (name for name in recipe.order() if not recipe.kind(name).every_token):
        section, contract = recipe.stages[name], recipe.kind(name).contract
        recipe.check_files(name)
        tests: list[Row] = []
        if not (name in lacking and read_by(section)):
            tests += read_split(section.data, contract, recipe.spec.seed).test or ()
        elif isinstance(section.data.test, str):  # the votes that it waits for hold out nothing yet
            tests += read_source(section.data.test, contract, section.data).rows
        if file := section.question_file():
            tests += read_source(file, QUESTION, DataSpec(path=file, encoding=section.data.encoding)).rows
        yield from tests

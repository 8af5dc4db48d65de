"""A stage's rows as far as they can be read, and all that a run would stop at in its files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pipeline.data.contracts import QUESTION, Contract
from pipeline.data.load import DataSpec, Part, Source, labels_as_answers, read_source, read_split, refusal
from pipeline.errors import UserError
from pipeline.recipe.recipe import Recipe
from pipeline.stages.stage import Rows
from pipeline.worker import load_rows

T = TypeVar("T")


def tried(read: Callable[[], T], faults: list[str]) -> T | None:
    """What `read` gives, or None and what was wrong among the faults."""
    try:
        return read()
    except UserError as error:
        faults.append(str(error))
        return None


def read_fit(recipe: Recipe, name: str) -> tuple[Rows | None, list[Source], list[str]]:
    """A stage's rows, without those that a run would stop at; None where too little can be read. And the faults."""
    section, contract = recipe.stages[name], recipe.kind(name).contract
    first: list[str] = []
    faults: list[str] = []
    if whole := tried(lambda: load_rows(recipe, name), first):
        return (*whole, [])
    skipping = section.data.model_copy(update={"on_bad_row": "skip"})

    def fit(spec: DataSpec, contract: Contract, part: Part) -> Source | None:
        skip = spec.model_copy(update={"on_bad_row": "skip"})
        source = tried(lambda: read_source(part.path, contract, skip, part), faults)
        if source and source.reasons and spec.on_bad_row == "stop":
            faults.append(refusal(source, contract))
        return source

    def test_part(path: str) -> Part:
        return Part(path=path, format=section.data.format, split=section.data.split, encoding=section.data.encoding)

    sources = [fit(section.data, contract, part) for part in skipping.parts()]
    test, questions = section.data.test, section.question_file()
    if isinstance(test, str) and not fit(section.data, contract, test_part(test)):
        skipping = skipping.model_copy(update={"test": None})
    asked = fit(DataSpec(path=questions), QUESTION, Part(path=questions)) if questions else None
    split = tried(lambda: read_split(skipping, contract, recipe.spec.seed), faults) if all(sources) else None
    faults = faults or first
    if split is None:
        return None, [], faults
    rows = Rows(split.train, split.test, labels_as_answers(asked.rows) if asked else [])
    return rows, [*split.sources, *([asked] if asked else [])], faults

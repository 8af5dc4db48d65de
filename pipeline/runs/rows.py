"""A stage's rows, as its recipe names them."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from pipeline.data.contracts import QUESTION
from pipeline.data.load import DataSpec, Source, labels_as_answers, read_source, read_split
from pipeline.errors import UserError
from pipeline.models.own_code import OwnCodeError
from pipeline.recipe.recipe import Recipe
from pipeline.stages.stage import Earlier, Rows


def load_rows(recipe: Recipe, stage: str) -> tuple[Rows, list[Source]]:
    """A stage's rows, checked; and the files they came from, which know what was refused."""
    section = recipe.stages[stage]
    recipe.check_files(stage)
    split = read_split(section.data, recipe.kind(stage).contract, recipe.spec.seed)
    earlier = {name: _read_earlier(recipe, name) for name in recipe.learnt_again(stage)}
    file = section.question_file()
    # A held-out share has no file of its own: its rows are counted with the file they were taken from.
    rows, sources = Rows(split.train, split.test, earlier=earlier), split.sources
    if file:
        questions = read_source(file, QUESTION, DataSpec(path=file, encoding=section.data.encoding))
        rows = replace(rows, questions=labels_as_answers(questions.rows))
        sources = [*sources, questions]
    try:
        section.check_rows(split.train, split.test)
        if environment := section.asked_with():
            from pipeline.models.environments import check_reset

            check_reset(environment, rows.questions)
            check_reset(environment, chain(rows.train, rows.test or []) if section.sampling() else [])
        return _add_tools(rows, section.asked_with()), sources
    except OwnCodeError as error:
        raise UserError(f"{recipe.place(stage, error.key)}: {error.problem}") from error


def _read_earlier(recipe: Recipe, stage: str) -> Earlier:
    """The rows that a stage was trained on, none of those that it held out."""
    section, kind = recipe.stages[stage], recipe.kind(stage)
    own = Rows(read_split(section.data, kind.contract, recipe.spec.seed).train)
    return Earlier(kind, section, _add_tools(own, section.asked_with()).train)


def _add_tools(rows: Rows, environment: str | None) -> Rows:
    """The rows with what their template is told of an environment's tools."""
    if environment is None:
        return rows
    from pipeline.models.environments import with_tools  # reads the class, and with it whatever that imports

    some = (None if part is None else with_tools(part, environment) for part in (rows.train, rows.test, rows.questions))
    train, test, questions = some
    return replace(rows, train=train or [], test=test, questions=questions or [])

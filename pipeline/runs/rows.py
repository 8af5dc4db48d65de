"""A stage's rows, as its recipe names them."""

from __future__ import annotations

from pipeline.data.contracts import QUESTION
from pipeline.data.load import DataSpec, Source, labels_as_answers, read_source, read_split
from pipeline.recipe.recipe import Recipe
from pipeline.stages.stage import Earlier, Rows


def load_rows(recipe: Recipe, stage: str) -> tuple[Rows, list[Source]]:
    """A stage's rows, checked; and the files they came from, which know what was refused."""
    section = recipe.stages[stage]
    recipe.check_files(stage)
    split = read_split(section.data, recipe.kind(stage).contract, recipe.spec.seed)
    section.check_rows(split.train, split.test)
    earlier = {name: _read_earlier(recipe, name) for name in recipe.learnt_again(stage)}
    file = section.question_file()
    # A held-out share has no file of its own: its rows are counted with the file they were taken from.
    if not file:
        return Rows(split.train, split.test, earlier=earlier), split.sources
    questions = read_source(file, QUESTION, DataSpec(path=file, encoding=section.data.encoding))
    return Rows(split.train, split.test, labels_as_answers(questions.rows), earlier), [*split.sources, questions]


def _read_earlier(recipe: Recipe, stage: str) -> Earlier:
    """The rows that a stage was trained on, none of those that it held out."""
    section, kind = recipe.stages[stage], recipe.kind(stage)
    return Earlier(kind, section, read_split(section.data, kind.contract, recipe.spec.seed).train)

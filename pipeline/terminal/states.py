"""Where the stages of a recipe stand: the rows that each would take, and what the next run would do."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.recipe.recipe import Recipe
from pipeline.runs.rows import load_rows
from pipeline.runs.states import State


def show_rows(recipe: Recipe) -> None:
    """One line per stage: how many rows it takes of its file, and what became of the others.

    Raises UserError naming file and line of rows that are unfit.
    """
    for name in recipe.order():
        data, sources = load_rows(recipe, name)
        files = sources[: len(recipe.stages[name].data.parts())]
        rows = sum(source.counts().rows for source in files)
        names = ", ".join(source.path for source in files)
        held_out = f", {len(data.test)} held out" if data.test is not None else ""
        asked = f", {len(data.questions)} questions" if data.questions else ""
        refused = sum(len(source.refused) for source in sources)
        unfit = f", {refused} refused" if refused else ""
        print(f"{name}: {len(data.train)} of {rows} rows from {names}{held_out}{asked}{unfit}")


def show_states(states: list[State], console: Console) -> None:
    """One line per stage: what the next run would do, and why."""
    table = Table("stage", "state", "why", box=None, pad_edge=False)
    colours = {"fresh": "green", "new": "cyan", "damaged": "red"}
    actions = {"fresh": "skipped", "unmeasured": "would be measured, not trained", "damaged": "would stop the run"}
    for state in states:
        action = f"{state.word}, {actions.get(state.word, 'would run')}"
        table.add_row(state.name, Text(action, style=colours.get(state.word, "yellow")), Text(state.why))
    console.print(table)

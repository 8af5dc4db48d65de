"""Where the stages of a recipe stand: the rows that each would take, and what the next run would do."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.disk.atomic import Json
from pipeline.recipe.recipe import Recipe
from pipeline.runs.rows import load_rows
from pipeline.runs.states import State, states
from pipeline.terminal.console import counted, print_rows
from pipeline.terminal.machine import describe
from pipeline.terminal.results import metrics_of


def count_rows(recipe: Recipe) -> dict[str, Json]:
    """Of each stage, how many rows it takes of its files, and what became of the others.

    Raises UserError naming file and line of rows that are unfit.
    """
    counts = {}
    for name in recipe.order():
        data, sources = load_rows(recipe, name)
        counts[name] = {
            "train": len(data.train),
            "held_out": None if data.test is None else len(data.test),
            "questions": len(data.questions),
            "sources": [source.counts() for source in sources],
        }
    return counts


def show_rows(recipe: Recipe, counts: dict[str, Json]) -> None:
    """One line per stage."""
    for name, count in counts.items():
        files = count["sources"][: len(recipe.stages[name].data.parts())]
        rows = sum(file.rows for file in files)
        names = ", ".join(file.path for file in files)
        held_out = "" if count["held_out"] is None else f", {count['held_out']} held out"
        asked = f", {counted(count['questions'], 'question')}" if count["questions"] else ""
        refused = sum(sum(source.refused.values()) for source in count["sources"])
        unfit = f", {refused} refused" if refused else ""
        print(f"{name}: {count['train']} of {counted(rows, 'row')} from {names}{held_out}{asked}{unfit}")


def states_as_json(recipe: Recipe, runs: Path) -> Json:
    """Where each stage stands, the manifest of what is there, and what its numbers are."""
    stages = {}
    for state in states(recipe, runs):
        manifest = recipe.artifact(state.name, runs).manifest()
        stages[state.name] = {
            "state": state.word,
            "why": state.why,
            "metrics": describe(metrics_of(recipe, state.name)),
            "manifest": manifest and manifest.as_json(),
        }
    return {"recipe": recipe.name, "stages": stages}


def show_states(found: list[State], console: Console) -> None:
    """One line per stage: what the next run would do, and why."""
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "state"):
        table.add_column(column, no_wrap=True)
    table.add_column("why")
    colours = {"fresh": "green", "new": "cyan", "damaged": "red"}
    actions = {"fresh": "skipped", "unmeasured": "would be measured, not trained", "damaged": "would stop the run"}
    for state in found:
        action = f"{state.word}, {actions.get(state.word, 'would run')}"
        table.add_row(state.name, Text(action, style=colours.get(state.word, "yellow")), Text(state.why))
    print_rows(table, console)

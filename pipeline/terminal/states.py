"""Where the stages of a recipe stand: the rows that each would take, and what the next run would do."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.data.shelf import Shelf
from pipeline.disk.atomic import Json
from pipeline.language.say import say, say_again
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.waiting import progress, waiting
from pipeline.runs.rows import load_rows
from pipeline.runs.states import State, standing
from pipeline.stages.stage import Rows
from pipeline.terminal.console import counted, print_rows
from pipeline.terminal.machine import describe
from pipeline.terminal.results import metrics_of


def count_rows(recipe: Recipe) -> tuple[dict[str, Json], dict[str, Rows], dict[str, Shelf[Json]]]:
    """Of each stage, how many rows it takes of its files, and what became of the others; the rows; and those refused.
    Nothing of a stage that waits for people's votes.

    Raises UserError naming file and line of rows that are unfit.
    """
    counts: dict[str, Json] = {}
    rows, refused = {}, {}
    lacking = waiting(recipe)
    for name in (name for name in recipe.order() if name not in lacking):
        rows[name], sources = load_rows(recipe, name)
        counts[name] = {
            "train": len(rows[name].train),
            "held_out": None if rows[name].test is None else len(rows[name].test or ()),
            "questions": len(rows[name].questions),
            "sources": [source.counts() for source in sources],
        }
        if unfit := next((source.refused for source in sources if source.refused), None):
            refused[name] = unfit
    return counts, rows, refused


def show_rows(recipe: Recipe, counts: dict[str, Json], refused: dict[str, Shelf[Json]]) -> None:
    """One line per stage, and one that names the first of the rows refused."""
    for name, count in counts.items():
        files = count["sources"][: len(recipe.stages[name].data.parts())]
        rows = sum(file.rows for file in files)
        names = ", ".join(file.path for file in files)
        taken = say("{n} of {rows} from {files}", n=count["train"], rows=counted(rows, "row"), files=names)
        held_out = "" if count["held_out"] is None else say("{n} held out", n=count["held_out"])
        asked = counted(count["questions"], "question") if count["questions"] else ""
        n = sum(sum(source.refused.values()) for source in count["sources"])
        unfit = say("{n} refused", n=n) if n else ""
        told = say(", ").join(filter(None, (taken, held_out, asked, unfit)))
        print(say("{stage}: {word}", stage=name, word=told))
        if name in refused:
            first, file = refused[name][0], recipe.artifact(name).refused
            place, reason = first["place"], first["reason"]
            print("  " + say("first refused: {place}: {reason}", place=place, reason=reason))
            print("  " + say("a run lists all of them in {file}", file=file))


def show_waiting(recipe: Recipe) -> None:
    """One line for each stage that waits for people's votes."""
    for name, lacking in waiting(recipe).items():
        told = say("{state}, {more}", state=say("waiting"), more=say_again(lacking.told))
        print(say("{stage}: {word}", stage=name, word=told))


def show_sound(path: str, stages: list[str], untried: list[str]) -> None:
    for why in untried:
        print("  " + say("not tried: {why}", why=why))
    order = " -> ".join(stages)
    print(say("{recipe}: sound, {stages}: {order}", recipe=path, stages=counted(len(stages), "stage"), order=order))


def states_as_json(recipe: Recipe, runs: Path) -> Json:
    """Where each stage stands, the manifest of what is there, and what its numbers are."""
    stages = {}
    for state in standing(recipe, runs):
        manifest = recipe.artifact(state.name, runs).manifest()
        stages[state.name] = {
            "state": state.word,
            "why": state.why,
            "metrics": describe(metrics_of(recipe, state.name)),
            "manifest": manifest and manifest.as_json(),
        }
    found: Json = {"recipe": recipe.name, "stages": stages}
    if recipe.spec.rounds:
        every = [progress(recipe, number) for number in range(1, recipe.spec.rounds.count + 1)]
        found["rounds"] = [{"labels": one.labels, "votes": one.votes, "full": one.full} for one in every]
    return found


def show_states(found: list[State], console: Console) -> None:
    """One line per stage: what the next run would do, and why."""
    table = Table(box=None, pad_edge=False)
    for column in (say("stage"), say("state")):
        table.add_column(column, no_wrap=True)
    table.add_column(say("why"))
    colours = {"fresh": "green", "running": "green", "new": "cyan", "waiting": "magenta", "damaged": "red"}
    actions = {
        "fresh": say("skipped"),
        "unmeasured": say("would be measured, not trained"),
        "waiting": say("passed over"),
        "damaged": say("would stop the run"),
    }
    for state in found:
        more = state.reason if state.word == "running" else actions.get(state.word, say("would run"))
        action = say("{state}, {more}", state=say_again(state.word), more=more)
        why = "" if state.word == "running" else state.reason
        table.add_row(state.name, Text(action, style=colours.get(state.word, "yellow")), Text(why))
    print_rows(table, console)

"""What `onebase run` ends with: the story, the numbers, some answers, and what to type next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.cells import set_cell_size
from rich.console import Console

from pipeline.data.votes import files_in, of_round
from pipeline.language.say import say, say_again
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.waiting import folders, waiting
from pipeline.runs.states import states
from pipeline.terminal.console import make_console
from pipeline.terminal.recipes import comes_along
from pipeline.terminal.results import as_typed, show_answers, show_results
from pipeline.terminal.story import show_story


def show_ending(recipe: Recipe, path: str, overrides: Sequence[str], runs: Path, page: str) -> None:
    """`page`: where the report lies, or why there is none."""
    console = make_console()
    console.print()
    show_story(recipe, runs, page, console)
    show_results(recipe, runs, console)
    show_answers(recipe, runs, console)
    show_next(recipe, as_typed(path, overrides, runs), runs, console)


def tell_stopped(recipe: Recipe, runs: Path, words: str) -> None:
    """To a person who has stopped a run. `words`: what was typed."""
    if any(state.word == "stopped" for state in states(recipe, runs)):
        again = say("stopped. To go on from there, type the same again: onebase {words}", words=words)
        print(again, file=sys.stderr)
    else:
        anew = say(
            "stopped. No checkpoint had been written, so the stage begins anew if you type the same again: "
            "onebase {words}",
            words=words,
        )
        print(anew, file=sys.stderr)


def tell_waiting(recipe: Recipe, path: str) -> bool:
    """Whether stages wait for people's votes; if so, says what to type."""
    first = next(iter(waiting(recipe).values()), None)
    if first is not None:
        command, far = f"onebase label {path}", say_again(first.told)
        print(say("Waiting for people, {progress}. To label: {command}", progress=far, command=command))
        for folder in (folder for folder in folders(recipe) if folder.is_dir() and files_in(folder)):
            told = say(
                "The votes in {folder} are of no round. To count them in the first, move them to {to}",
                folder=folder, to=of_round(folder, 1),
            )  # fmt: skip
            print(told)
    return first is not None


def show_next(recipe: Recipe, path: str, runs: Path, console: Console) -> None:
    """Where things are and what to type next."""
    print_line = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    print_line("\n" + say("Adapters, manifests, logs: {folder}", folder=f"{runs / recipe.name}/<stage>/"))
    print_line(say("What to type next:"))
    named = shlex.split(path)[0]
    talk = [(say("talk to it"), f"onebase chat {shlex.quote(str(runs / recipe.name))}")]
    for what, command in (
        *(talk if any(recipe.kind(name).answers for name in recipe.order()) else []),
        (say("compare stages") if len(recipe.order()) > 1 else say("measure it"), f"onebase eval {path}"),
        (say("see where it is"), f"onebase status {path}"),
        *([(say("make your own"), f"onebase cp {shlex.quote(named)} my.yaml")] if comes_along(named) else []),
    ):
        print_line(f"  {set_cell_size(what, 17)}{command}")

"""What a run came to, in a few plain lines: what could not be answered, what can, what it cost, where the page is."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipeline.disk.atomic import Json
from pipeline.disk.manifest import Manifest
from pipeline.measure.matching import correct
from pipeline.recipe.recipe import Recipe
from pipeline.runs.told import asked, one_line, read_samples
from pipeline.terminal.console import counted
from pipeline.terminal.results import clock

INDENT = 10
QUOTED = 150
"""Characters of an answer."""


def show_story(recipe: Recipe, runs: Path, page: str, console: Console) -> None:
    """`page`: where the report lies, or why there is none."""
    finished = {name: recipe.artifact(name, runs).manifest() for name in recipe.order()}
    done = {name: manifest for name, manifest in finished.items() if manifest is not None}
    told = [*_answered(recipe, runs, done), ("cost", _cost(list(done.values()))), ("page", page)]
    console.print(Text(f"{recipe.name} in short", style="bold"))
    for heading, text in told:
        if heading == "page":  # a path is to be copied whole
            console.print(f"  {heading:<{INDENT - 2}}{text}", highlight=False, markup=False, soft_wrap=True)
            continue
        table = Table.grid()
        table.add_column(style="cyan", width=INDENT - 2)
        table.add_column()
        table.add_row(heading, Text(text))
        console.print(Padding(table, (0, 0, 0, 2)))
    console.print()


def _answered(recipe: Recipe, runs: Path, done: dict[str, Manifest]) -> list[tuple[str, str]]:
    """Before the first stage that was asked questions and after the last, with a question that only the latter got
    right."""
    ends = [name for name, manifest in done.items() if "question_accuracy" in manifest.after]
    if not ends:
        return []
    first, last = ends[0], ends[-1]
    before, now = done[first].before.get("question_accuracy"), done[last].after["question_accuracy"]
    said: dict[str, str] = {}
    if before is not None:
        said["before"] = f"Before {first}: {_share(before, done[first])}."
    said["now"] = f"After {last}: {_share(now, done[last])}."
    sample = _learnt(read_samples(recipe.artifact(last, runs)))
    if sample:
        said["before"] = said.get("before", "") + f' The base, asked "{asked(sample)}": {_quoted(sample["base"])}'
        said["now"] += f" Asked the same: {_quoted(sample['after'])}"
    return [(when, text.strip()) for when, text in sorted(said.items())]


def _share(accuracy: float, manifest: Manifest) -> str:
    asked_of = manifest.data.questions
    return f"{round(accuracy * asked_of)} of {asked_of} held-out questions answered right"


def _learnt(samples: list[Json]) -> Json | None:
    """The first that the base got wrong and the policy right."""
    known = [sample for sample in samples if sample.get("answer") and {"base", "after"} <= sample.keys()]
    learnt = (sample for sample in known if not correct(sample, sample["base"]) and correct(sample, sample["after"]))
    return next(learnt, None)


def _quoted(answer: str) -> str:
    text = one_line(answer)
    return f'"{text if len(text) <= QUOTED else text[:QUOTED].rstrip() + " ..."}"'


def _cost(done: list[Manifest]) -> str:
    """Of all stages that are finished, also those of earlier runs."""
    time = clock(sum(manifest.seconds for manifest in done))
    peak = max(manifest.peak_memory_mib for manifest in done)
    spent = [manifest.energy_wh for manifest in done if manifest.energy_wh is not None]
    energy = f"{sum(spent):.1f} Wh ({done[-1].energy_of})" if len(spent) == len(done) else "energy is not counted here"
    stages = counted(len(done), "stage")
    return f"{time} for {stages} on {done[-1].device}, {peak / 1024:.1f} GiB of memory at most; {energy}."

"""What a run came to, in a few plain lines: what could not be answered, what can, what it cost, where the page is."""

from __future__ import annotations

from pathlib import Path

from rich.cells import set_cell_size
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipeline.disk.atomic import Json
from pipeline.disk.manifest import Manifest
from pipeline.language.say import say, say_again
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
    told = [*_answered(recipe, runs, done), (say("cost"), _cost(list(done.values())))]
    console.print(Text(say("{name} in short", name=recipe.name), style="bold"))
    for heading, text in told:
        table = Table.grid()
        table.add_column(style="cyan", width=INDENT - 2)
        table.add_column(overflow="fold")
        table.add_row(heading, Text(text))
        console.print(Padding(table, (0, 0, 0, 2)))
    heading = set_cell_size(say("page"), INDENT - 2)
    console.print(f"  {heading}{page}", highlight=False, markup=False, soft_wrap=True)  # to be copied whole


def _answered(recipe: Recipe, runs: Path, done: dict[str, Manifest]) -> list[tuple[str, str]]:
    """Before the first stage that was asked questions and after the last, with a question that only the latter got
    right."""
    ends = [name for name, manifest in done.items() if "question_accuracy" in manifest.after]
    if not ends:
        return []
    first, last = ends[0], ends[-1]
    before, now = done[first].before.get("question_accuracy"), done[last].after["question_accuracy"]
    then = [] if before is None else [say("Before {stage}: {share}.", stage=first, share=_share(before, done[first]))]
    later = [say("After {stage}: {share}.", stage=last, share=_share(now, done[last]))]
    if sample := _learnt(read_samples(recipe.artifact(last, runs))):
        answers = _quoted(sample["base"]), _quoted(sample["after"])
        then.append(say('The base, asked "{question}": {answer}', question=asked(sample), answer=answers[0]))
        later.append(say("Asked the same: {answer}", answer=answers[1]))
    return [(when, say(" ").join(told)) for when, told in ((say("before"), then), (say("now"), later)) if told]


def _share(accuracy: float, manifest: Manifest) -> str:
    asked_of = manifest.data.questions
    return say("{n} of {all} held-out questions answered right", n=round(accuracy * asked_of), all=asked_of)


def _learnt(samples: list[Json]) -> Json | None:
    """The first that the base got wrong and the policy right."""
    known = [sample for sample in samples if sample.get("answer") and {"base", "after"} <= sample.keys()]
    learnt = (sample for sample in known if not correct(sample, sample["base"]) and correct(sample, sample["after"]))
    return next(learnt, None)


def _quoted(answer: str) -> str:
    text = one_line(answer)
    return say('"{text}"', text=text if len(text) <= QUOTED else text[:QUOTED].rstrip() + " ...")


def _cost(done: list[Manifest]) -> str:
    """Of all stages that are finished, also those of earlier runs."""
    time = clock(sum(manifest.seconds for manifest in done))
    peak = max(manifest.peak_memory_mib for manifest in done)
    spent = [manifest.energy_wh for manifest in done if manifest.energy_wh is not None]
    energy = say("energy is not counted here")
    if len(spent) == len(done):
        energy = say("{wh} Wh ({what})", wh=f"{sum(spent):.1f}", what=say_again(done[-1].energy_of))
    return say(
        "{time} for {stages} on {device}, {memory} GiB of memory at most; {energy}.",
        time=time,
        stages=counted(len(done), "stage"),
        device=say_again(done[-1].device),
        memory=f"{peak / 1024:.1f}",
        energy=energy,
    )

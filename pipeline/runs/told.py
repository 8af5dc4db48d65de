"""What a person is told of a stage as it begins and ends: what it learns, one question answered before and after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rich.cells import cell_len, chop_cells

from pipeline.disk.artifact import Artifact
from pipeline.disk.atomic import Json, read_lines
from pipeline.language.say import say, say_again
from pipeline.recipe.recipe import Recipe

LINE = 80
"""Columns of a line at most."""


class Told:
    """Follows one question through the stages of a run: the first that is asked of any."""

    def __init__(self, recipe: Recipe, runs: Path) -> None:
        self.recipe, self.runs = recipe, runs
        self.question = ""

    def begin(self, stage: str) -> None:
        learns = self.recipe.kind(stage).learns
        if learns:
            print(f"  {say_again(learns)}", flush=True)

    def end(self, stage: str) -> None:
        """The question before and after, or of a stage that answers nothing its first held-out number."""
        out = self.recipe.artifact(stage, self.runs)
        answered = {asked(sample): sample for sample in read_samples(out) if {"before", "after"} <= sample.keys()}
        if answered:
            self.question = self.question if self.question in answered else next(iter(answered))
            print(shorten(f"  {self.question}"))
            sample = answered[self.question]
            before, after = (one_line(sample[when]) for when in ("before", "after"))
        else:
            manifest = out.finished()
            numbers = manifest.before.keys() & manifest.after.keys()
            metric = next((one for one in self.recipe.kind(stage).headlines if one.name in numbers), None)
            if metric is None:
                return
            before, after = (metric.written(told[metric.name], fine=True) for told in (manifest.before, manifest.after))
            print(f"  {metric.said}")
        print(shorten("    " + say("before: {text}", text=before)))
        print(shorten("    " + say("after:  {text}", text=after)), flush=True)


def read_samples(out: Artifact) -> list[Json]:
    """The answers that a stage has kept; none where there are none to read."""
    samples = []
    try:
        lines = read_lines(out.samples)
    except OSError:
        return []
    for line in lines:
        try:
            samples.append(json.loads(line))
        except ValueError:
            continue
    return samples


def asked(sample: Json) -> str:
    """The question that a sample answers."""
    prompt = sample["prompt"]
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def one_line(answer: str) -> str:
    return " ".join(answer.split()) or say("(nothing)")


def shorten(text: str) -> str:
    """To one line of the terminal."""
    columns = min(LINE, shutil.get_terminal_size().columns)
    return text if cell_len(text) <= columns else f"{chop_cells(text, columns - 4)[0].rstrip()} ..."

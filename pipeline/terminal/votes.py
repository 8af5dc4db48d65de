"""onebase votes: votes of other tools, and votes for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.terminal.help import command
from pipeline.terminal.options import Lang


def add_to(app: typer.Typer) -> None:
    command(app, "votes", "onebase votes export.json labels")(votes)


def votes(
    source: Annotated[
        str, typer.Argument(metavar="FROM", help="Votes, an export of Label Studio or Argilla, or TRL's rows.")
    ],
    to: Annotated[Path, typer.Argument(metavar="TO", help="The folder to write; a .jsonl file for trl and kto.")],
    shape: Annotated[
        Literal["votes", "label-studio", "argilla", "trl", "kto"],
        typer.Option("--as", help="votes, label-studio, argilla, trl (comparisons) or kto (thumbs)."),
    ] = "votes",
    lang: Lang = "en",
) -> None:
    """Exchange votes with Label Studio, Argilla and TRL.

    What FROM holds is told by its rows. What has no place in TO is counted and said.
    """
    from pipeline.label.exchange import exchange

    for line in exchange(source, to, shape):
        print(line)

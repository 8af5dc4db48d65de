"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.language.say import speak

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or a name that `onebase ls` shows.")]
RunOrRecipe = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder (runs/quickstart), or a recipe.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder (runs/quickstart).")]
Overrides = Annotated[
    list[str],
    typer.Option("-o", "--override", metavar="KEY=VALUE", help="Change one value: stages.dpo.train.beta=0.05"),
]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where runs are kept.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; everything else goes to stderr.")]
Lang = Annotated[
    Literal["en", "zh"], typer.Option("--lang", callback=speak, help="Tell it in English (en) or in Chinese (zh).")
]

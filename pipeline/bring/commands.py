"""The commands for whoever begins: what this machine can do, a recipe to start from, and a schema for the editor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="Write it there instead of printing it.")]


def add_to(app: typer.Typer) -> None:
    app.command()(init)
    app.command("import")(bring)
    app.command()(env)
    app.command()(schema)


def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="Where to write it.")] = Path("recipe.yaml"),
    base: Annotated[str, typer.Option(metavar="BASE", help="A Hub id, a local folder, or a .gguf file.")] = "",
    data: Annotated[str, typer.Option(metavar="PATH", help="A file, a folder, or a data set on the Hub.")] = "",
    card: Annotated[str, typer.Option(metavar="CARD", help="rtx3060, 12GB, or none.")] = "",
    goal: Annotated[str, typer.Option(metavar="GOAL", help="follow, prefer, classify, corpus or chain.")] = "",
    language: Annotated[str, typer.Option(metavar="LANGUAGE", help="Of the data.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; take the default of what is not given.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a first recipe: five questions, each of which is also an option."""
    from pipeline.bring.init import Given, start

    start(file, Given(base, data, card, goal, language), asking=not yes, force=force)


def bring(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="LLaMA-Factory or axolotl YAML, TRL YAML or command line.")
    ],
    out: Out = None,
) -> None:
    """Make a recipe of other trainers' configs; say what has no counterpart.

    Several configs of one chain become one recipe. With LLaMA-Factory's give its dataset_info.json too.
    """
    from pipeline.bring.importing import bring as brought

    brought(files, out)


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print it for machines.")] = False,
    runs: Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where runs would be kept.")] = Path("runs"),
) -> None:
    """Show what of this machine works, and what to do about the rest.

    The exit status is 0 unless something that every run needs is broken.
    """
    from rich.console import Console

    from pipeline.errors import UserError
    from pipeline.terminal.env import show_environment

    if broken := show_environment(runs, as_json, Console()):
        raise UserError(f"not working here, and every run needs it: {', '.join(broken)}")


def schema(out: Out = None) -> None:
    """Print the JSON schema of a recipe, for editors."""
    import json

    from pipeline.recipe.schema import make_schema

    _give(json.dumps(make_schema(), indent=1, ensure_ascii=False) + "\n", out)


def _give(text: str, out: Path | None) -> None:
    from pipeline.disk.atomic import write_text

    if out is None:
        print(text, end="")
    else:
        write_text(out, text)
        print(out)

"""The commands for whoever begins: what this machine can do, a recipe to start from, and a schema for the editor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="Write it there instead of printing it.")]


def add_to(app: typer.Typer) -> None:
    app.command()(env)
    app.command()(schema)


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
        raise UserError(f"every run needs what is broken here: {', '.join(broken)}")


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

"""The commands for whoever begins: what this machine can do, a recipe to start from, and a schema for the editor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="Write it there instead of printing it.")]


def add_to(app: typer.Typer) -> None:
    app.command()(schema)


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

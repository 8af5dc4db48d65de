"""The commands for whoever begins: what this machine can do, a recipe to start from, and a schema for the editor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.terminal.help import command
from pipeline.terminal.options import AsJson

Out = Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", help="Write to this file; else print.")]


def add_to(app: typer.Typer) -> None:
    command(app, "init", "onebase init my.yaml --data rows.jsonl")(init)
    command(app, "import", "onebase import sft.yaml dataset_info.json -o my.yaml")(bring)
    command(app, "env", "onebase env")(env)
    command(app, "schema", "onebase schema -o recipe.schema.json")(schema)


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")] = Path("recipe.yaml"),
    base: Annotated[str, typer.Option(metavar="BASE", help="A Hub id, a local folder, or a .gguf file.")] = "",
    data: Annotated[str, typer.Option(metavar="PATH", help="A file, a folder, or a data set on the Hub.")] = "",
    card: Annotated[str, typer.Option(metavar="CARD", help="The GPU: rtx3060, 12GB, or none.")] = "",
    goal: Annotated[str, typer.Option(metavar="GOAL", help="follow, prefer, thumbs, classify, corpus or chain.")] = "",
    language: Annotated[str, typer.Option(metavar="LANGUAGE", help="The language of the data.")] = "",
    encoding: Annotated[str, typer.Option(metavar="NAME", help="Of the data, if it is not UTF-8: cp1252.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing. Take the defaults.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a first recipe for your data, from five questions.

    Each question is also an option. What is given as an option is not asked.
    """
    from pipeline.bring.init import Given, start

    start(file, Given(base, data, card, goal, language, encoding), asking=not yes, force=force)


def bring(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="YAML files, or a text file with a TRL command.")],
    out: Out = None,
) -> None:
    """Turn LLaMA-Factory, axolotl or TRL configs into a recipe.

    Several configs of one chain become one recipe. Give LLaMA-Factory's dataset_info.json too. Every word that has no
    counterpart is listed.
    """
    from pipeline.bring.importing import bring as brought

    brought(files, out)


def env(
    as_json: AsJson = False,
    runs: Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where runs would be kept.")] = Path("runs"),
) -> None:
    """Show what works on this machine, and how to mend the rest.

    The exit status is 0 unless something that every run needs is broken.
    """
    from pipeline.errors import UserError
    from pipeline.terminal.console import make_console
    from pipeline.terminal.env import show_environment

    if broken := show_environment(runs, as_json, make_console()):
        raise UserError(f"not working here, and every run needs it: {', '.join(broken)}")


def schema(out: Out = None) -> None:
    """Print the JSON schema of a recipe, for editors."""
    import json

    from pipeline.errors import UserError
    from pipeline.recipe.schema import TITLE, make_schema

    if out is not None and out.exists() and f'"title": "{TITLE}"' not in out.read_text("utf-8", errors="replace"):
        raise UserError(f"{out} is there already and is no schema of OneBase; choose another name")
    _give(json.dumps(make_schema(), indent=1, ensure_ascii=False) + "\n", out)


def _give(text: str, out: Path | None) -> None:
    from pipeline.disk.atomic import write_text

    if out is None:
        print(text, end="")
    else:
        write_text(out, text)
        print(out)

"""How `--help` reads: the commands by task, in the order of a newcomer, and an example below each of them."""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from pipeline import __version__

TASKS = {
    "Begin": ("env", "ls", "cp", "init", "import"),
    "Before a run": ("check", "data", "plan", "schema"),
    "Run": ("run", "status", "label", "votes"),
    "Judge": ("eval", "report", "chat", "compare"),
    "Give away": ("publish", "serve"),
}
EXAMPLES = [
    ("onebase init my.yaml", "asks five questions and writes a recipe"),
    ("onebase run my.yaml", "trains its stages; type it again to go on"),
]
WIDEST, NARROWEST = 78, 30
"""Columns of a line of help."""


class Command(TyperCommand):
    """A command whose help ends in an example."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [re.sub("[{}]", "", piece) for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for heading, kind in (("Arguments", "argument"), ("Options", "option")):
            records = [each.get_help_record(ctx) for each in self.get_params(ctx) if each.param_type_name == kind]
            if rows := [(record[0].split(" <")[0], record[1]) for record in records if record]:
                with formatter.section(heading):
                    _write_rows(formatter, rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            with formatter.section("Example"):
                formatter.write_text(self.epilog)


class Group(TyperGroup):
    """All commands by task."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        width = max(NARROWEST, min(WIDEST, shutil.get_terminal_size().columns - 2))
        return super().make_context(*args, terminal_width=width, **extra)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["COMMAND [OPTIONS] [ARGUMENTS]"]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for task, names in TASKS.items():
            with formatter.section(task):
                _write_rows(formatter, [(name, _sentence(self.commands[name])) for name in names])
        with formatter.section("Example"):
            _write_rows(formatter, EXAMPLES)
        formatter.write_paragraph()
        formatter.write_text(
            "onebase COMMAND --help lists the options of a command; onebase --version names the version."
        )


def print_version(wanted: bool) -> None:
    if wanted:
        print(f"onebase {__version__}")
        raise typer.Exit


def command(app: typer.Typer, name: str, example: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command of the app; `example`: a line that people type."""
    return app.command(name, cls=Command, epilog=example)


def _write_rows(formatter: Any, rows: list[tuple[str, str]]) -> None:
    """In two columns. In a narrow terminal, what does not fit into the first stands above the second."""
    formatter.write_dl(rows, col_max=30 if formatter.width > 50 else 14)


def _sentence(one: Any) -> str:
    """What a command does: the first paragraph of its help."""
    return " ".join(inspect.cleandoc(one.help or "").split("\n\n")[0].split())

"""What commands print: help by task, JSON for machines, and no escape codes or broken rows on any terminal."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
from typer.main import get_command

from pipeline.cli import app
from pipeline.terminal.help import TASKS


def help_of(*words: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        app([*words, "--help"], prog_name="onebase")
    return capsys.readouterr().out


def test_the_help_names_every_command_once_and_on_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: Any = get_command(app)
    shown = help_of(columns=80, monkeypatch=monkeypatch, capsys=capsys)
    listed = re.findall(r"^  (\w+)  +[A-Z].*\.$", shown, re.MULTILINE)
    assert sorted(listed) == sorted(commands.commands)
    assert [name for names in TASKS.values() for name in names] == listed
    assert all(f"\n{task}:\n" in shown for task in TASKS)


@pytest.mark.parametrize("columns", [80, 60, 40])
def test_every_help_fits_the_terminal_and_ends_in_an_example_that_parses(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    group: Any = get_command(app)
    for name, command in group.commands.items():
        shown = help_of(name, columns=columns, monkeypatch=monkeypatch, capsys=capsys)
        assert max(map(len, shown.splitlines())) <= columns
        example = shlex.split(" ".join(shown.rpartition("Example:")[2].split()))
        assert example[:2] == ["onebase", name]
        command.make_context(name, example[2:])

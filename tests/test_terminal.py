"""What commands print: help by task, JSON for machines, and no escape codes or broken rows on any terminal."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, seal, tiny_tree, write_recipe
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from typer.main import get_command

from pipeline.cli import app, main
from pipeline.disk import metrics
from pipeline.disk.atomic import digest, locked
from pipeline.plan import cards
from pipeline.plan.lengths import lengths_of
from pipeline.plan.shapes import read_shapes
from pipeline.plan.stage import plan_stage, planned_model
from pipeline.recipe.recipe import build, read
from pipeline.runs.told import shorten
from pipeline.terminal.console import print_rows
from pipeline.terminal.help import TASKS
from pipeline.terminal.results import show_answers
from pipeline.training.progress import make_bar


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


@pytest.fixture
def sealed(tiny_base: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A recipe, and a folder of runs in which two of its stages are finished, with answers in Chinese."""
    tree = tiny_tree(tiny_base, tmp_path)
    recipe = build(tree)
    answers = [{"prompt": "哪里？", "answer": "岛", "base": "不知道" * 40, "before": "", "after": "在岛上" * 40}]
    for name, after in (("pretrain", {"loss": 4.125}), ("sft", {"question_accuracy": 59 / 72})):
        out = recipe.artifact(name, tmp_path / "runs")
        out.adapter.mkdir(parents=True)
        (out.adapter / "adapter_model.safetensors").write_bytes(name.encode())
        out.samples.write_text("".join(json.dumps(row) + "\n" for row in answers if name != "pretrain"))
        seal(recipe, name, tmp_path / "runs", after, before=dict.fromkeys(after, 5.213), seconds=3731.0)
    return write_recipe(tree, tmp_path / "recipe.yaml"), tmp_path / "runs"


def typed(*words: str, columns: int, **variables: str) -> str:
    """What a command writes to a terminal so wide."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    unset = ("COLUMNS", "NO_COLOR", "FORCE_COLOR")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **variables}
    command = [sys.executable, "-m", "pipeline", *words]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=its, stdout=its, stderr=its)
    os.close(its)
    written = b""
    with contextlib.suppress(OSError):  # the terminal is gone with the process
        while piece := os.read(ours, 65536):
            written += piece
    assert process.wait() == 0, written.decode()
    os.close(ours)
    return written.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("columns", "variables"),
    [(80, {}), (80, {"NO_COLOR": "1"}), (60, {"TERM": "dumb"}), (40, {"NO_COLOR": "yes"}), (60, {"NO_COLOR": ""})],
    ids=str,
)
def test_a_terminal_is_given_no_wider_lines_and_no_codes_that_it_does_not_want(
    sealed: tuple[Path, Path], columns: int, variables: dict[str, str]
) -> None:
    shown = typed("status", str(sealed[0]), "--runs", str(sealed[1]), columns=columns, **variables)
    wants = not variables.get("NO_COLOR") and variables.get("TERM") != "dumb"  # an empty NO_COLOR is none
    assert ("\x1b[" in shown) == wants
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert "\x1b" not in plain and "\r" not in plain
    assert max(map(cell_len, plain.splitlines())) <= columns and " \n" not in plain
    assert all(f" {number}" in plain for number in ("5.213", "4.125", "81.9 %", "62:11"))
    rows = [line for line in plain.splitlines() if line.startswith("sft ")]
    if columns == 80:  # a row is one line
        assert any("81.9 %" in line and line.rstrip().endswith("62:11    1") for line in rows)


NAMES = """
    tiny base pretrain sft reward dpo train.num_train_epochs gpu MiB GiB GB B CUDA GPU KV bf16 logits x
"""
"""What stays as it is in Chinese: the run, its stages, what is typed, and the field's own terms."""


def test_status_and_plan_are_chinese_throughout_and_only_by_the_option(sealed: tuple[Path, Path]) -> None:
    where = (str(sealed[0]), "--runs", str(sealed[1]), "-o", "stages.sft.train.num_train_epochs=3")
    for command in ("status", "plan"):
        shown = typed(command, *where, "--lang", "zh", columns=80, NO_COLOR="1")
        told = [line for line in shown.splitlines() if "岛" not in line]  # what the data say stays
        assert max(cell_len(line.rstrip()) for line in told) <= 80
        assert not set(re.findall(r"[A-Za-z][\w.]*", "\n".join(told))) - set(NAMES.split()), shown
        assert {"最新，跳过", "等 sft 完成"} <= set(re.split("  +|\n", shown)), shown
        unasked = typed(command, *where, columns=80, LANG="zh_CN.UTF-8", ONEBASE_LANG="zh", NO_COLOR="1")
        assert "fresh, skipped" in unasked and "最新" not in unasked


@pytest.mark.parametrize("columns", [30, 60])
def test_running_text_without_spaces_is_broken_and_never_cut(columns: int) -> None:
    text = "答对的问题 0 个百分点，95 % 区间：−60 到 +60。它与 sft 的距离是每个回答 0.7 nat，" + "在偶然范围内" * 9
    table = Table("stage", "why", box=None)
    table.columns[0].no_wrap = True
    table.add_row("dpo", text)
    shown = Console(file=io.StringIO(), width=columns)
    print_rows(table, shown)
    told = shown.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(cell_len, told.splitlines())) <= columns
    assert "".join(told.split()).endswith("".join(text.split())), told


def machine(
    *words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], status: int = 0
) -> tuple[Any, str]:
    """What a command prints as JSON on stdout, and what it says on stderr."""
    monkeypatch.setattr(sys, "argv", ["onebase", *words, "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capfd.readouterr()
    assert (ended.value.code or 0) == status, printed.err
    return json.loads(printed.out) if printed.out else None, printed.err


def test_json_of_status_holds_the_manifests(
    sealed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path, runs = map(str, sealed)
    found, said = machine("status", path, "--runs", runs, monkeypatch=monkeypatch, capfd=capfd)
    assert not said
    for name in ("pretrain", "sft"):
        on_disk = json.loads((sealed[1] / "tiny" / name / "manifest.json").read_text())
        assert found["stages"][name]["state"] == "fresh" and found["stages"][name]["manifest"] == on_disk
    assert (found["stages"]["dpo"]["state"], found["stages"]["dpo"]["manifest"]) == ("new", None)
    accuracy, loss = (
        found["stages"]["sft"]["metrics"]["question_accuracy"],
        found["stages"]["pretrain"]["metrics"]["loss"],
    )
    assert (accuracy["unit"], accuracy["direction"]) == ("%", "higher")
    assert (loss["label"], loss["unit"], loss["direction"]) == ("corpus loss", "nats a token", "lower")
    again, said = machine("run", path, "--runs", runs, "--only", "pretrain", monkeypatch=monkeypatch, capfd=capfd)
    assert again == {"ran": [], **found} and "[1/1] pretrain: fresh" in said


def test_status_tells_of_a_run_that_is_going_on(
    sealed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path, runs = map(str, sealed)
    recipe = read(path)
    dpo = recipe.artifact("dpo", sealed[1])

    def found() -> tuple[str, str]:
        stage = machine("status", path, "--runs", runs, monkeypatch=monkeypatch, capfd=capfd)[0]["stages"]["dpo"]
        return stage["state"], stage["why"]

    with locked(sealed[1] / "tiny" / ".lock", "") as note:
        assert found()[0] == "new"
        note("dpo")
        assert found() == ("running", f"before its first step (process {os.getpid()})")
        dpo.claim(digest(recipe.parts()["dpo"]), recipe.parts()["dpo"])
        dpo.note_steps(8)
        metrics.append(dpo.metrics, 5, {"loss": 1.0})
        assert found() == ("running", f"step 5 of 8 (process {os.getpid()})")
        shown = typed("status", path, "--runs", runs, columns=80, NO_COLOR="1")
        assert f"running, step 5 of 8 (process {os.getpid()})" in shown
        nothing = typed("status", path, "--runs", str(sealed[1] / "none"), columns=80, NO_COLOR="1")
        assert "held-out data" not in nothing  # no table without a row
    assert found()[0] == "stale"  # nobody holds the lock: it was cut short


@pytest.mark.parametrize("columns", [40, 80, 100])
def test_each_answer_keeps_the_name_of_who_gave_it(sealed: tuple[Path, Path], columns: int) -> None:
    recipe = read(sealed[0])
    long = "The people of the island make soap. " * 200 + "x" * 500
    sample = {"prompt": "What?", "answer": "soap", "base": long, "before": "", "after": long}
    for name in ("pretrain", "sft"):
        recipe.artifact(name, sealed[1]).samples.write_text(json.dumps(sample) + "\n")
    shown = Console(file=io.StringIO(), width=columns)
    show_answers(recipe, sealed[1], shown)
    lines = shown.file.getvalue().splitlines()[2:]  # type: ignore[attr-defined]
    assert [line.split()[0] for line in lines] == ["base", "pretrain", "sft"]
    assert all(columns - 2 <= cell_len(line) <= columns and line.endswith("…") for line in lines)


def test_outside_the_clone_the_recipes_are_said_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["ls"], ["cp", "quickstart", "x.yaml"]):
        monkeypatch.setattr(sys, "argv", ["onebase", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2 and "no recipes here: they lie in the folder recipes/" in capfd.readouterr().err


def test_json_of_plan_holds_what_was_planned(
    sealed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("plan", str(sealed[0]), "--gpu", "rtx3060", "--runs", str(sealed[1]))
    found, _ = machine(*words, monkeypatch=monkeypatch, capfd=capfd)
    recipe, card = read(sealed[0]), cards.find_card("rtx3060")
    spec = recipe.spec.model
    model = planned_model(spec, read_shapes(spec))
    assert found["card"] == asdict(card) and found["room"] == card.room
    for name in recipe.order():
        kind, section = recipe.kind(name), recipe.stages[name]
        planned = plan_stage(kind, section, model, spec, lengths_of(section, kind.contract, 7), card)
        told = found["stages"][name]["needs"]
        assert told["memory"] == asdict(planned.memory)
        assert told["work"] == asdict(planned.work) | {"again": list(planned.work.again)}  # JSON has no tuples
        assert (told["total"], told["fits"], told["disk"]) == (planned.memory.total, True, planned.disk)
        assert (told["minutes"], told["tokens_per_second"]) == (planned.minutes, planned.tokens_per_second)
    assert [found["stages"][name]["state"] for name in ("pretrain", "dpo")] == ["fresh", "new"]


def test_json_of_check_and_compare_and_errors(
    sealed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    found, said = machine("check", str(sealed[0]), monkeypatch=monkeypatch, capfd=capfd)
    assert found["stages"]["dpo"]["train"] == 24 and found["stages"]["dpo"]["held_out"] == 8  # lines of the files
    assert found["stages"]["sft"]["questions"] == 4 and "sound, 4 stages" in said
    for name, after in (("a", 0.5), ("b", 0.75)):
        tree = json.loads(sealed[0].read_text()) | {"name": name, "seed": len(name + str(after))}
        recipe = build(tree)
        out = recipe.artifact("pretrain", tmp_path / "two")
        out.adapter.mkdir(parents=True)
        (out.adapter / "adapter_model.safetensors").write_bytes(b"")
        seal(recipe, "pretrain", tmp_path / "two", {"corpus_loss": after})
        (tmp_path / "two" / name / "recipe.yaml").write_text(json.dumps(tree))
    words = ("compare", str(tmp_path / "two" / "a"), str(tmp_path / "two" / "b"))
    found, _ = machine(*words, monkeypatch=monkeypatch, capfd=capfd)
    assert found["recipe"] == {"name": ["a", "b"], "seed": [4, 5]} and found["data"] == {}
    assert found["after"] == {"pretrain corpus_loss": [0.5, 0.75]} and found["evaluated"] == [False, False]
    nothing, said = machine("status", "no.yaml", monkeypatch=monkeypatch, capfd=capfd, status=2)
    assert nothing is None and said.startswith("error: there is no file no.yaml")


@pytest.mark.parametrize("columns", [120, 80, 60, 40])
def test_the_bar_is_one_line_and_none_where_codes_are_not_wanted(columns: int) -> None:
    def console(**variables: str) -> Console:
        return Console(file=io.StringIO(), width=columns, force_terminal=True, _environ=variables)

    bar = make_bar(console(TERM="xterm"))
    assert bar
    bar.add_task("pretrain", total=12345, completed=6789, note="loss 1.2345 23456 tok/s", whole=", the run about 99:59")
    shown = Console(file=io.StringIO(), width=columns)
    shown.print(bar.get_renderable())
    (line,) = shown.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert cell_len(line) <= columns and " 6789/12345 " in line and "left" in line and "…" not in line
    assert make_bar(console(TERM="dumb")) is None and make_bar(console(TERM="xterm", NO_COLOR="1")) is None


def test_a_line_is_cut_by_the_width_of_its_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, width in ((60, 60), (200, 80)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert width - 2 <= cell_len(shorten("岛" * 55)) <= width and shorten("岛" * 55).endswith(" ...")
        assert shorten("岛" * (width // 2)) == "岛" * (width // 2)

"""Files and folders are written whole or not at all, under names nobody else has; a manifest reads as written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import seal, tiny_tree
from pydantic import ValidationError

from pipeline.disk.atomic import NEW, digest, temporary_beside, write_text, written_whole
from pipeline.errors import UserError
from pipeline.recipe.recipe import build
from pipeline.runs.states import states

WRITE = """
import sys, time
from pathlib import Path
from pipeline.disk.atomic import written_whole
with written_whole(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print(folder, flush=True)
    time.sleep(60)
"""


def write_and_sleep(to: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process in the midst of writing a folder, and where it writes."""
    env = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen([sys.executable, "-c", WRITE, str(to)], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_user_calls_tmp_stays(tmp_path: Path) -> None:
    names = ["model.tmp", "model.onebase-thesis.tmp", f"model.{os.getpid()}.tmp", "modelx.onebase-0123456789abcdef.tmp"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / f"note.{os.getpid()}.tmp").write_text("mine")
    with written_whole(tmp_path / "model") as folder:
        (folder / "new").write_text("new")
    write_text(tmp_path / "note", "text")
    assert (tmp_path / f"note.{os.getpid()}.tmp").read_text() == "mine"
    kept = {*names, "model", "note", f"note.{os.getpid()}.tmp"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert all((tmp_path / name / "thesis.txt").read_text() == "years of work" for name in names)


def test_what_killed_processes_left_is_removed_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    killed, left = write_and_sleep(tmp_path / "model")
    killed.kill()
    killed.wait()
    alive, writing = write_and_sleep(tmp_path / "model")
    try:
        assert (left / "half").is_file(), "it was killed only a moment ago"
        long_ago = time.time() - 2 * NEW
        for folder in (left, writing):
            os.utime(folder, (long_ago, long_ago))
        with temporary_beside(tmp_path / "model") as folder:
            assert {path.name for path in tmp_path.iterdir()} == {writing.name, folder.name}
        assert (writing / "half").is_file()
    finally:
        alive.send_signal(signal.SIGKILL)
        alive.wait()


def test_a_folder_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "model") as folder:
        (folder / "new").write_text("new")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]
    with written_whole(tmp_path / "model") as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]


def without(told: dict[str, Any], *path: str) -> dict[str, Any]:
    """The same tree without one of its keys."""
    first, *rest = path
    return {key: without(value, *rest) if key == first else value for key, value in told.items() if [key] != [*path]}


def test_a_manifest_reads_back_as_it_was_written_and_a_damaged_one_is_named(tiny_base: Path, tmp_path: Path) -> None:
    recipe = build(tiny_tree(tiny_base, tmp_path))
    artifact = recipe.artifact("pretrain", tmp_path)
    artifact.adapter.mkdir(parents=True)
    (artifact.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    seal(recipe, "pretrain", tmp_path, {"loss": 2.0})
    file = artifact.folder / "manifest.json"
    whole = artifact.verify()
    told = json.loads(file.read_text())
    assert told == whole.as_json() and list(told)[0] == "stage" and whole.after == {"loss": 2.0}
    assert digest(whole.parts.model_dump()) == whole.fingerprint
    for damaged, place in (
        (without(told, "after"), "after"),
        (without(told, "data", "measured_on"), "data.measured_on"),
        ({**told, "seconds": "65"}, "seconds"),  # nothing is converted
        ({**told, "wall_seconds": 65.0}, "wall_seconds"),  # a word of another version
    ):
        file.write_text(json.dumps(damaged))
        why = rf"manifest.json is damaged, or another version of OneBase wrote it \(see '{place}'\). Delete its folder"
        with pytest.raises(UserError, match=why):
            states(recipe, tmp_path)
    file.write_text(json.dumps(told))
    with pytest.raises(ValidationError, match="after.loss"):
        artifact.seal(whole.model_copy(update={"after": {"loss": "2.0"}}))
    assert json.loads(file.read_text()) == told

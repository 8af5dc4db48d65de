"""scripts/gpu_check.sh, tried on the CPU: a row that dies is a row, and the others still run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_a_row_that_dies_leaves_the_others(tmp_path: Path) -> None:
    out = tmp_path / "gpu_check.json"
    # "resume" has no chain to compare with here, so it dies
    words = ["--device", "cpu", "--tiny", "--only", "resume", "full sft", "--out", str(out)]
    said = subprocess.run(
        ["scripts/gpu_check.sh", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=240, env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert said.returncode == 1, said.stdout + said.stderr
    resume, full = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert resume["word"] == "FAILS" and "has not run" in resume["why"]
    assert full["word"] == "holds" and full["found"]["at_once"] == [4], "a batch of 8 rows, of which 4 fit"
    assert "| resume | FAILS |" in said.stdout and "| full sft | holds |" in said.stdout


def test_no_time_left_is_said_of_a_row(tmp_path: Path) -> None:
    out = tmp_path / "gpu_check.json"
    words = ["--device", "cpu", "--tiny", "--only", "8B sft", "--minutes", "0.1", "--out", str(out)]
    command = [sys.executable, "scripts/gpu_check.py", *words]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=240, check=True)
    assert [row["word"] for row in json.loads(out.read_text(encoding="utf-8"))["rows"]] == ["no time"]
